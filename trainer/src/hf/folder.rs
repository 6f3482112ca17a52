//! Folders that are finished or invisible: written under another name, synced, renamed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

/// A folder in the making. Its files lie in `NAME.partial` until [`NewFolder::commit`] gives it its name.
pub struct NewFolder {
    target: PathBuf,
    partial: PathBuf,
}

impl NewFolder {
    /// Begins `target`. A folder of that name may stand there: it is replaced at the end, if it holds nothing but what
    /// such folders hold.
    pub fn begin(target: &Path) -> Result<NewFolder> {
        let name = target
            .file_name()
            .with_context(|| format!("{} does not name a folder", target.display()))?;
        refuse_foreign(target)?;
        let mut partial = name.to_os_string();
        partial.push(".partial");
        let partial = target.with_file_name(partial);
        let old = old_of(&partial);
        if old.exists() && target.exists() {
            // A commit was interrupted while it removed what it had replaced.
            refuse_foreign(&old)?;
            fs::remove_dir_all(&old).with_context(|| format!("removing the replaced {}", old.display()))?;
        } else if old.exists() {
            // Or before the new one had its name.
            fs::rename(&old, target).with_context(|| format!("giving {} its name back", target.display()))?;
        }
        if partial.exists() {
            refuse_foreign(&partial)?;
            fs::remove_dir_all(&partial).with_context(|| format!("removing the unfinished {}", partial.display()))?;
        }
        fs::create_dir_all(&partial).with_context(|| format!("making the folder {}", partial.display()))?;
        Ok(NewFolder {
            target: target.into(),
            partial,
        })
    }

    /// Where its files are written now.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        write_synced(&self.partial.join(name), contents.as_ref())
    }

    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        write_json(&self.partial.join(name), value)
    }

    /// Copies those of a tokenizer's files that `from` has. `tokenizer.json` must be there.
    pub fn copy_tokenizer(&self, from: &Path) -> Result<()> {
        ensure!(
            from.join("tokenizer.json").is_file(),
            "{} has no tokenizer.json; a tokenizer folder is written by `panglot vocab` or by `transformers`",
            from.display()
        );
        for name in TOKENIZER_FILES.iter().filter(|name| from.join(name).is_file()) {
            let contents = fs::read(from.join(name)).with_context(|| from.join(name).display().to_string())?;
            self.write(name, contents)?;
        }
        Ok(())
    }

    /// Copies what `from` says of how its model writes (which tokens end a text, temperatures), if it says anything.
    pub fn copy_generation_config(&self, from: &Path) -> Result<()> {
        let file = from.join(GENERATION_CONFIG);
        if file.is_file() {
            self.write(
                GENERATION_CONFIG,
                fs::read(&file).with_context(|| file.display().to_string())?,
            )?;
        }
        Ok(())
    }

    /// Gives the folder its name. What stood there before goes.
    pub fn commit(self) -> Result<()> {
        sync(&self.partial)?;
        let parent = match self.target.parent() {
            Some(parent) if parent != Path::new("") => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let old = self.target.exists().then(|| old_of(&self.partial));
        let in_place = || format!("giving {} its name", self.target.display());
        if let Some(old) = &old {
            fs::rename(&self.target, old).with_context(in_place)?;
        }
        fs::rename(&self.partial, &self.target).with_context(in_place)?;
        sync(&parent)?;
        if let Some(old) = &old {
            fs::remove_dir_all(old).with_context(|| format!("removing the replaced {}", old.display()))?;
        }
        Ok(())
    }
}

pub const GENERATION_CONFIG: &str = "generation_config.json";

/// Where what `partial` replaces goes first.
fn old_of(partial: &Path) -> PathBuf {
    let mut name = partial.file_name().unwrap_or_default().to_os_string();
    name.push(".old");
    partial.with_file_name(name)
}

/// All files a tokenizer may come in.
pub const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// A folder is replaced only if a program like this one wrote all that is in it: nobody's other files are deleted.
fn refuse_foreign(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let entries = fs::read_dir(folder).with_context(|| format!("{} is not a folder to write", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| folder.display().to_string())?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let known = name.ends_with(".safetensors")
            || name.ends_with(".safetensors.index.json")
            || TOKENIZER_FILES.contains(&name.as_str())
            || ["config.json", GENERATION_CONFIG, "adapter_config.json", "README.md"].contains(&name.as_str());
        if !known || entry.path().is_dir() {
            bail!(
                "{} holds {name}, which is no part of a model folder, and would be replaced; \
                 choose another folder or move it away",
                folder.display()
            );
        }
    }
    Ok(())
}

pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).with_context(|| path.display().to_string())?;
    text.push(b'\n');
    write_synced(path, &text)
}

fn write_synced(path: &Path, contents: &[u8]) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    file.write_all(contents)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("writing {}", path.display()))
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("syncing {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_finished_or_invisible_and_replaces_its_elder() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        for text in ["first", "second"] {
            let folder = NewFolder::begin(&target).unwrap();
            folder.write("config.json", text).unwrap();
            let visible = fs::read_to_string(target.join("config.json")).unwrap_or_default();
            assert_ne!(visible, text);
            folder.commit().unwrap();
            assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), text);
        }
        let names: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["model"], "nothing is left over");
    }

    #[test]
    fn what_an_interrupted_attempt_left_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        NewFolder::begin(&target).unwrap().write("config.json", "half").unwrap();
        let folder = NewFolder::begin(&target).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        folder.commit().unwrap();
    }

    #[test]
    fn a_commit_that_was_interrupted_is_finished_by_the_next() {
        let root = tempfile::tempdir().unwrap();
        let (target, old) = (root.path().join("model"), root.path().join("model.partial.old"));
        let make = |folder: &Path, text: &str| {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join("config.json"), text).unwrap();
        };
        let read = || fs::read_to_string(target.join("config.json")).unwrap();
        // While the old one was being removed.
        make(&target, "second");
        make(&old, "first");
        let folder = NewFolder::begin(&target).unwrap();
        assert_eq!((read().as_str(), old.exists()), ("second", false));
        folder.write("config.json", "third").unwrap();
        folder.commit().unwrap();
        assert_eq!(read(), "third");
        // Between the two renames: there is no other whole one.
        fs::rename(&target, &old).unwrap();
        make(&root.path().join("model.partial"), "fourth");
        NewFolder::begin(&target).unwrap();
        assert_eq!((read().as_str(), old.exists()), ("third", false));
    }

    #[test]
    fn somebody_elses_files_are_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("thesis.tex"), "years of work").unwrap();
        let said = NewFolder::begin(root.path()).err().unwrap().to_string();
        assert!(said.contains("holds thesis.tex"), "{said}");
        assert!(root.path().join("thesis.tex").exists());
    }
}
