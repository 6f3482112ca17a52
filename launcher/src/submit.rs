//! A run as a Slurm job script: pure text from settings, every value checked and quoted. No shell reads anything here; the one
//! that runs the script later meets each value inside quotes.

use configs::Device;

/// Filled by [`script`]; the ready scripts in the same folder are made from it.
const TEMPLATE: &str = include_str!("../../slurm/template.sbatch");

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error(
        "{key} is not a setting of the job; the nearest is {nearest}. Settings of the config have a dot, such as train.steps=5"
    )]
    Unknown { key: String, nearest: &'static str },
    #[error("{key} = {value:?} {rule}")]
    Wrong {
        key: String,
        value: String,
        rule: &'static str,
    },
    #[error("{what} {value:?} holds a line break or a NUL, which would end its line in the job script; take it out")]
    Control { what: String, value: String },
    #[error("--array and --chain are two ways to the same; give one of them")]
    ArrayAndChain,
    #[error("{what} = {value}: name at least 2 and at most 1000 jobs")]
    Jobs { what: &'static str, value: u32 },
}

/// What the user says of the job; the config says the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Submission {
    /// `key=value` of the job, as [`Settings`] takes them.
    pub settings: Settings,
    pub config: String,
    pub overrides: Vec<String>,
    /// The job's name unless `job_name=` gives another; the config's.
    pub name: String,
    /// How the job calls panglot: a path, or a name on the PATH.
    pub panglot: String,
    pub device: Option<Device>,
    /// Jobs one after the other, where requeue is forbidden.
    pub array: Option<u32>,
    pub chain: Option<u32>,
    /// Tells chains of the same config apart.
    pub nonce: String,
    pub modules: Vec<String>,
    /// Bash lines of the user's own, read as they are.
    pub environment_file: Option<String>,
    pub apptainer: Option<String>,
    pub binds: Vec<String>,
    /// Checks the nodes first, each time.
    pub doctor: bool,
}

/// The job's own `key=value`s, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub nodes: usize,
    pub ranks_per_node: usize,
    /// Directives in the order of [`KEYS`], as (option, value).
    directives: Vec<(&'static str, String)>,
    mpi: String,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            nodes: 1,
            ranks_per_node: 1,
            directives: Vec::new(),
            mpi: "pmix".to_owned(),
        }
    }
}

enum Kind {
    Number,
    Time,
    /// Names and lists of them, as Slurm writes them.
    Words,
    /// A name that stands in the script without quotes.
    Word,
    /// A name or a file's path.
    Text,
}

/// key, sbatch's option, what it holds
const KEYS: [(&str, &str, Kind); 17] = [
    ("nodes", "nodes", Kind::Number),
    ("ranks_per_node", "ntasks-per-node", Kind::Number),
    ("cpus_per_rank", "cpus-per-task", Kind::Number),
    ("gpus_per_node", "gpus-per-node", Kind::Words),
    ("gres", "gres", Kind::Words),
    ("memory", "mem", Kind::Words),
    ("time", "time", Kind::Time),
    ("account", "account", Kind::Words),
    ("partition", "partition", Kind::Words),
    ("qos", "qos", Kind::Words),
    ("constraint", "constraint", Kind::Words),
    ("reservation", "reservation", Kind::Words),
    ("exclude", "exclude", Kind::Words),
    ("mail_user", "mail-user", Kind::Words),
    ("job_name", "job-name", Kind::Text),
    ("output", "output", Kind::Text),
    ("mpi", "mpi", Kind::Word),
];

fn says(words: &[String], key: &str) -> bool {
    words
        .iter()
        .any(|word| word.split_once('=').is_some_and(|(said, _)| said == key))
}

impl Settings {
    /// Takes the job's settings out of `words`; what is left are overrides of the config.
    pub fn take(words: &[String]) -> Result<(Settings, Vec<String>), SubmitError> {
        let (mut settings, mut rest) = (Settings::default(), Vec::new());
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match KEYS.iter().find(|(known, ..)| *known == key) {
                Some((key, option, kind)) => settings.set(key, option, kind, value)?,
                None if key.contains('.') || OF_CONFIG.contains(&key) => rest.push(word.clone()),
                None => {
                    let key = key.to_owned();
                    let nearest = nearest(&key);
                    return Err(SubmitError::Unknown { key, nearest });
                }
            }
        }
        // A rank a GPU, unless it is said otherwise.
        let gpus = settings
            .directives
            .iter()
            .find(|(option, _)| *option == "gpus-per-node");
        let gpus = gpus.and_then(|(_, value)| value.rsplit(':').next()?.parse().ok());
        if let Some(gpus) = gpus.filter(|_| !says(words, "ranks_per_node")) {
            settings.ranks_per_node = gpus;
        }
        let position = |option: &str| KEYS.iter().position(|(_, known, _)| *known == option);
        settings.directives.sort_by_key(|(option, _)| position(option));
        Ok((settings, rest))
    }

    /// Whether these words say where ranks run.
    pub fn say_where(words: &[String]) -> bool {
        ["nodes", "ranks_per_node", "gpus_per_node"]
            .iter()
            .any(|key| says(words, key))
    }

    /// One more, or another, setting.
    pub fn with(mut self, word: &str) -> Result<Settings, SubmitError> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match KEYS.iter().find(|(known, ..)| *known == key) {
            Some((key, option, kind)) => self.set(key, option, kind, value)?,
            None => {
                return Err(SubmitError::Unknown {
                    key: key.to_owned(),
                    nearest: nearest(key),
                });
            }
        }
        Ok(self)
    }

    pub fn ranks(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    fn set(&mut self, key: &str, option: &'static str, kind: &Kind, value: &str) -> Result<(), SubmitError> {
        one_line(key, value)?;
        let wrong = |rule| SubmitError::Wrong {
            key: key.to_owned(),
            value: value.to_owned(),
            rule,
        };
        let allowed = |more: &str| {
            let is = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
            !value.is_empty() && value.chars().all(is) && !value.starts_with('-')
        };
        match kind {
            Kind::Number if !value.parse().is_ok_and(|n: u32| n > 0) => {
                return Err(wrong("is not a whole number above 0; write it in digits"));
            }
            Kind::Time if !is_time(value) => {
                return Err(wrong(
                    "is not a time of Slurm's; write minutes, HH:MM:SS or D-HH:MM:SS, such as 1-00:00:00",
                ));
            }
            Kind::Words if !allowed("_.,:@+=/&|*[]()-") => {
                return Err(wrong(
                    "holds characters that no such name has; use letters, digits and _.,:@+=/&|*[]()-",
                ));
            }
            Kind::Word if !allowed("_.-") => {
                return Err(wrong("is no such name; use letters, digits and _.-"));
            }
            // Lines of #SBATCH are read by Slurm, whose quotes are not a shell's: nothing that would need any.
            Kind::Text if !allowed("_.,:@+=/%~-") => {
                return Err(wrong(
                    "cannot stand in a line of #SBATCH; use letters, digits and _.,:@+=/%~-",
                ));
            }
            _ => {}
        }
        match key {
            "nodes" => self.nodes = value.parse().unwrap_or(1),
            "ranks_per_node" => self.ranks_per_node = value.parse().unwrap_or(1),
            "mpi" => self.mpi = value.to_owned(),
            _ => {
                // Who says it twice means the last.
                self.directives.retain(|(known, _)| *known != option);
                self.directives.push((option, value.to_owned()));
            }
        }
        Ok(())
    }

    fn has(&self, option: &str) -> bool {
        self.directives.iter().any(|(known, _)| *known == option)
    }
}

/// Keys of the config without a dot.
const OF_CONFIG: [&str; 3] = ["hardware", "name", "seed"];

fn nearest(key: &str) -> &'static str {
    let shared = |known: &str| {
        let letters = known.chars().filter(|c| key.contains(*c)).count();
        let prefix = known.chars().zip(key.chars()).take_while(|(a, b)| a == b).count();
        (prefix, letters)
    };
    KEYS.iter()
        .map(|(known, ..)| *known)
        .max_by_key(|known| shared(known))
        .unwrap_or("nodes")
}

/// The whole job script.
pub fn script(job: &Submission) -> Result<String, SubmitError> {
    check(job)?;
    let run: Vec<String> = std::iter::once(&job.config)
        .chain(&job.overrides)
        .map(|word| quoted(word))
        .collect();
    let values = [
        ("title", title(job)),
        ("directives", directives(job)),
        ("environment", environment(job)),
        ("panglot", panglot(job)),
        ("run", run.join(" ")),
        ("mpi", job.settings.mpi.clone()),
        ("doctor", doctor(job)),
        ("series", series(job)),
        ("again", again(job)),
    ];
    Ok(fill(TEMPLATE, &values))
}

/// One pass, so that a value which looks like a place to fill is left as it is.
fn fill(template: &str, values: &[(&str, String)]) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, behind) = after.split_once("}}").expect("the template's places are closed");
        let (_, value) = values
            .iter()
            .find(|(known, _)| *known == name)
            .expect("the template's places are known");
        out += before;
        out += value;
        rest = behind;
    }
    out + rest
}

fn check(job: &Submission) -> Result<(), SubmitError> {
    if job.array.is_some() && job.chain.is_some() {
        return Err(SubmitError::ArrayAndChain);
    }
    for (what, jobs) in [("--array", job.array), ("--chain", job.chain)] {
        if let Some(value) = jobs.filter(|n| !(2..=1000).contains(n)) {
            return Err(SubmitError::Jobs { what, value });
        }
    }
    let mut all = vec![
        ("the config", &job.config),
        ("the name", &job.name),
        ("the program", &job.panglot),
    ];
    all.extend(job.overrides.iter().map(|word| ("the setting", word)));
    all.extend(job.modules.iter().map(|word| ("the module", word)));
    all.extend(job.binds.iter().map(|word| ("the folder", word)));
    all.extend(job.apptainer.iter().map(|word| ("the image", word)));
    all.extend(job.environment_file.iter().map(|word| ("the file", word)));
    all.into_iter().try_for_each(|(what, value)| one_line(what, value))
}

fn title(job: &Submission) -> String {
    format!(
        "{} on {} × {} ranks.",
        job.name, job.settings.nodes, job.settings.ranks_per_node
    )
}

fn directives(job: &Submission) -> String {
    let settings = &job.settings;
    let mut lines = vec![
        ("nodes", settings.nodes.to_string()),
        ("ntasks-per-node", settings.ranks_per_node.to_string()),
    ];
    if job.device == Some(Device::Cuda) && !settings.has("gpus-per-node") && !settings.has("gres") {
        lines.push(("gpus-per-node", settings.ranks_per_node.to_string()));
    }
    lines.extend(settings.directives.iter().cloned());
    if settings.has("mail-user") {
        // Slurm sends none unless it is told when.
        lines.push(("mail-type", "END,FAIL,REQUEUE,TIME_LIMIT".to_owned()));
    }
    for (option, value) in [("job-name", job.name.as_str()), ("output", "panglot-%j.out")] {
        if !settings.has(option) {
            lines.push((option, value.to_owned()));
        }
    }
    if job.chain.is_some() {
        // By the name a chain's jobs wait for each other, and what is left of them is cancelled: no other chain may have it.
        for (_, name) in lines.iter_mut().filter(|(option, _)| *option == "job-name") {
            *name = format!("{name}-{}", job.nonce);
        }
    }
    // What an attempt said is kept when the next one speaks.
    lines.push(("open-mode", "append".to_owned()));
    // Every rank is asked to save and stop before the wall-time limit: Slurm may be a minute early, and a save takes its time.
    lines.push(("signal", "USR1@120".to_owned()));
    match (job.array, job.chain) {
        (Some(jobs), _) => lines.push(("array", format!("1-{jobs}%1"))),
        (_, Some(_)) => lines.push(("dependency", "singleton".to_owned())),
        _ => {}
    }
    let requeue = if job.array.or(job.chain).is_some() {
        "no-requeue"
    } else {
        "requeue"
    };
    let lines = lines
        .iter()
        .map(|(option, value)| format!("#SBATCH --{option}={value}\n"));
    lines.collect::<String>() + &format!("#SBATCH --{requeue}")
}

fn environment(job: &Submission) -> String {
    let mut out = String::new();
    for module in &job.modules {
        out += &format!("module load {} || exit 2\n", quoted(module));
    }
    if let Some(file) = &job.environment_file {
        // Without a slash bash would look for it on the PATH.
        let file = if file.contains('/') {
            file.clone()
        } else {
            format!("./{file}")
        };
        out += &format!("set -a; . {} || exit 2; set +a\n", quoted(&file));
    }
    out
}

fn panglot(job: &Submission) -> String {
    let mut words = vec![];
    if let Some(image) = &job.apptainer {
        words.extend(["apptainer", "exec"].map(str::to_owned));
        if job.device == Some(Device::Cuda) {
            words.push("--nv".to_owned());
        }
        for folder in &job.binds {
            words.extend(["--bind".to_owned(), quoted(folder)]);
        }
        words.push(quoted(image));
    }
    words.push(quoted(&job.panglot));
    words.join(" ")
}

fn doctor(job: &Submission) -> String {
    if !job.doctor {
        return String::new();
    }
    format!(
        "# A node that would spoil the run is found before it does.\n\
         srun --mpi={} --kill-on-bad-exit=0 --wait=40 \"${{panglot[@]}}\" doctor \"${{run[@]}}\"\n\
         code=$?\n\
         if [ \"$code\" -ne 0 ]; then\n    exit \"$code\"\nfi\n",
        job.settings.mpi
    )
}

fn series(job: &Submission) -> String {
    match (job.array, job.chain) {
        (Some(_), _) => "\"$SLURM_ARRAY_JOB_ID\"".to_owned(),
        (_, Some(_)) => quoted(&format!("{}-{}", job.name, job.nonce)),
        _ => "\"$SLURM_JOB_ID\"".to_owned(),
    }
}

/// What follows the last attempt of this job. `job ended` says 4 where another job is due.
fn again(job: &Submission) -> String {
    let cancel = match (job.array, job.chain) {
        (Some(_), _) => "scancel --state=PENDING \"$SLURM_ARRAY_JOB_ID\"",
        (_, Some(_)) => "scancel --state=PENDING --user=\"$(id -un)\" --name=\"$SLURM_JOB_NAME\"",
        _ => {
            return "# --requeue answers a lost node and pre-emption, not this. Slurm ends the script once it has taken the job back.\n\
                    if [ \"$code\" -eq 4 ]; then\n    code=75\n    scontrol requeue \"$SLURM_JOB_ID\" && sleep 120\nfi"
                .to_owned();
        }
    };
    format!(
        "# The next job goes on; where nothing would be won by it, none does.\n\
         if [ \"$code\" -eq 4 ]; then\n    code=75\nelse\n    {cancel}\nfi"
    )
}

fn one_line(what: &str, value: &str) -> Result<(), SubmitError> {
    if value.chars().any(|c| matches!(c, '\n' | '\r' | '\0')) {
        let (what, value) = (what.to_owned(), value.to_owned());
        return Err(SubmitError::Control { what, value });
    }
    Ok(())
}

/// For bash: inside single quotes nothing means anything but the quote itself.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// "90", "30:00", "12:00:00", "1-12", "1-12:00", "1-12:00:00"
fn is_time(value: &str) -> bool {
    let (days, clock) = value
        .split_once('-')
        .map_or((None, value), |(days, clock)| (Some(days), clock));
    let is_number = |part: &str| !part.is_empty() && part.len() <= 6 && part.chars().all(|c| c.is_ascii_digit());
    let parts: Vec<&str> = clock.split(':').collect();
    days.is_none_or(is_number) && parts.len() <= 3 && parts.iter().all(|part| is_number(part))
}
