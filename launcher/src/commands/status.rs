//! `panglot status`: where a run stands; with --follow, until it is over.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use super::App;
use launcher::status::Status;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run's folder, or the config
    #[arg(value_name = "RUN|CONFIG")]
    pub of: PathBuf,
    /// Show it again and again until the run is finished
    #[arg(short, long)]
    pub follow: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    pub every: u64,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let run = if args.of.is_dir() {
        args.of.clone()
    } else {
        configs::load_for_any_ranks(&args.of, &[])?.folders.run
    };
    loop {
        let status = Status::read(&run)?;
        if args.follow && !app.json && std::io::stdout().is_terminal() {
            // Home, and clear what stands below.
            print!("\u{1b}[H\u{1b}[J");
        }
        app.print(&status, || status.to_string())?;
        if !args.follow || status.is_over() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(args.every));
    }
}
