//! How long this job may still run, as Slurm tells it.

use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::place::SlurmJob;

/// When the job will be ended; `Ok(None)` outside of Slurm, or where it has no limit.
///
/// # Errors
/// Where there is a job and Slurm does not say how long it may run.
pub fn job_end(job: &SlurmJob) -> Result<Option<SystemTime>> {
    if let Some(end) = &job.end_time {
        // Seconds since 1970; Slurm 22.05 does not set it yet.
        let seconds = end
            .trim()
            .parse()
            .with_context(|| format!("SLURM_JOB_END_TIME = {end:?}"))?;
        return Ok(Some(UNIX_EPOCH + Duration::from_secs(seconds)));
    }
    let Some(id) = &job.id else { return Ok(None) };
    ensure!(
        !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()),
        "SLURM_JOB_ID = {id:?} is no job's number"
    );
    let output = Command::new("squeue")
        .args(["-h", "-j", id, "-o", "%L"])
        .output()
        .context("running squeue")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "squeue -h -j {id} -o %L ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(time_left(said.trim())?.map(|left| SystemTime::now() + left))
}

/// Slurm's "[days-]hours:minutes:seconds", from the right; "UNLIMITED" is none.
fn time_left(text: &str) -> Result<Option<Duration>> {
    if text == "UNLIMITED" {
        return Ok(None);
    }
    let wrong = || format!("squeue says {text:?} is left, which is no time");
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (days.parse().with_context(wrong)?, clock),
        None => (0, text),
    };
    let fields: Vec<u64> = clock
        .split(':')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(wrong)?;
    ensure!((2..=3).contains(&fields.len()), wrong());
    let seconds = fields.iter().fold(0, |sum, field| sum * 60 + field);
    Ok(Some(Duration::from_secs(days * 86_400 + seconds)))
}

/// Whether to save and end now: less is left than a safety margin and twice the longest step and save, all in seconds.
pub fn is_short(left: f64, safety: f64, longest_step: f64, longest_save: f64) -> bool {
    left < safety + 2.0 * (longest_step + longest_save)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slurm_s_times_are_read() {
        for (text, seconds) in [
            ("0:07", 7),
            ("12:07", 727),
            ("1:00:00", 3600),
            ("2-03:04:05", 2 * 86_400 + 3 * 3600 + 4 * 60 + 5),
        ] {
            assert_eq!(time_left(text).unwrap(), Some(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(time_left("UNLIMITED").unwrap(), None);
        for text in ["", "INVALID", "NOT_SET", "7", "1:2:3:4", "a-1:00", "-1:00"] {
            assert!(time_left(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_job_s_own_word_comes_first_and_no_job_has_no_end() {
        let job = |id: Option<&str>, end: Option<&str>| SlurmJob {
            id: id.map(str::to_owned),
            end_time: end.map(str::to_owned),
        };
        let end = job_end(&job(Some("7"), Some("1700000000"))).unwrap();
        assert_eq!(end, Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
        assert_eq!(job_end(&job(None, None)).unwrap(), None);
        assert!(job_end(&job(Some("7; reboot"), None)).is_err());
        assert!(job_end(&job(None, Some("soon"))).is_err());
    }

    #[test]
    fn there_is_time_for_one_more_step_and_save_and_the_margin() {
        assert!(!is_short(60.1, 60.0, 0.0, 0.0));
        assert!(is_short(59.9, 60.0, 0.0, 0.0));
        assert!(is_short(89.0, 60.0, 5.0, 10.0));
        assert!(!is_short(91.0, 60.0, 5.0, 10.0));
    }
}
