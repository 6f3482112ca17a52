//! What is waited for only so long: other programs, and this one.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How a program ended and what it wrote to its standard output; `None` when it was not through within `limit`, and was killed.
///
/// # Errors
/// When it cannot be started.
pub fn output(command: &mut Command, limit: Duration) -> io::Result<Option<(ExitStatus, String)>> {
    let deadline = Instant::now() + limit;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let out = child.stdout.take().expect("piped");
    let (tell, told) = mpsc::channel();
    // By another thread: a program that writes more than a pipe holds would else never end.
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = { out }.read_to_end(&mut bytes);
        let _ = tell.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    let Some(status) = ended(&mut child, deadline)? else {
        child.kill()?;
        // Whoever hangs in a driver does not even die: it is not waited for.
        ended(&mut child, Instant::now() + Duration::from_millis(500))?;
        return Ok(None);
    };
    // What it has started may still hold the pipe.
    let rest = deadline.saturating_duration_since(Instant::now());
    Ok(told.recv_timeout(rest).ok().map(|said| (status, said)))
}

/// While it lives, a clock runs.
pub struct Limit {
    _stop: mpsc::Sender<()>,
}

impl Limit {
    /// After `limit` a thread of its own does what `over` says: to end the process, where the one that should is held.
    pub fn set(limit: Duration, over: impl FnOnce() + Send + 'static) -> Limit {
        let (stop, stopped) = mpsc::channel();
        std::thread::spawn(move || {
            if stopped.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                over();
            }
        });
        Limit { _stop: stop }
    }

    /// Nothing is over any more.
    pub fn lift(self) {
        drop(self);
    }
}

fn ended(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_lifted_in_time_does_nothing() {
        let (tell, told) = mpsc::channel();
        let set = |limit| {
            let tell = tell.clone();
            Limit::set(limit, move || tell.send(limit).unwrap_or_default())
        };
        let long = Duration::from_secs(60);
        set(long).lift();
        let short = Duration::from_millis(10);
        let held = set(short);
        assert_eq!(told.recv_timeout(long), Ok(short));
        held.lift();
    }

    #[test]
    fn what_ends_in_time_is_heard_and_what_does_not_is_killed() {
        let (status, said) = output(Command::new("echo").arg("a"), Duration::from_secs(20))
            .unwrap()
            .unwrap();
        assert!(status.success() && said == "a\n", "{status} {said}");
        // More than a pipe holds.
        let mut much = Command::new("head");
        much.args(["-c", "300000", "/dev/zero"]);
        let (_, said) = output(&mut much, Duration::from_secs(20)).unwrap().unwrap();
        assert_eq!(said.len(), 300_000);
        let began = Instant::now();
        assert!(
            output(Command::new("sleep").arg("60"), Duration::from_millis(100))
                .unwrap()
                .is_none()
        );
        assert!(began.elapsed() < Duration::from_secs(20));
        assert!(output(&mut Command::new("/no/program"), Duration::from_secs(1)).is_err());
    }
}
