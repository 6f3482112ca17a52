//! The job's secret: 256 bits that its ranks share and nobody else on the machines can read. In the environment or in a file of
//! mode 0600; never among arguments, which everybody can list.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error(
        "the job's secret is not 64 hexadecimal digits; `panglot` makes one, or: head -c 32 /dev/urandom | xxd -p -c 64"
    )]
    NotHex,
    #[error("{} can be read by others than its owner (mode {mode:o}); chmod 600 it, and make a new secret", file.display())]
    Readable { file: PathBuf, mode: u32 },
    #[error("{} belongs to user {owner}, not to you; another program's file is not trusted", file.display())]
    Foreign { file: PathBuf, owner: u32 },
    #[error("{}: {source}", file.display())]
    File { file: PathBuf, source: io::Error },
}

impl Secret {
    pub fn new() -> io::Result<Secret> {
        Ok(Secret(random()?))
    }

    pub fn from_hex(text: &str) -> Result<Secret, SecretError> {
        let hash = blake3::Hash::from_hex(text.trim()).map_err(|_| SecretError::NotHex)?;
        Ok(Secret(*hash.as_bytes()))
    }

    pub fn from_file(file: &Path) -> Result<Secret, SecretError> {
        Secret::from_hex(&read_private(file)?)
    }

    /// For the environment of the job, or a file of mode 0600.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Reads a small file that nobody but its owner, who must be this user, may read.
pub(super) fn read_private(file: &Path) -> Result<String, SecretError> {
    let failed = |source| SecretError::File {
        file: file.to_owned(),
        source,
    };
    let mut opened = File::open(file).map_err(failed)?;
    let metadata = opened.metadata().map_err(failed)?;
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    if owner != Uid::effective().as_raw() {
        return Err(SecretError::Foreign {
            file: file.to_owned(),
            owner,
        });
    }
    if mode & 0o077 != 0 {
        return Err(SecretError::Readable {
            file: file.to_owned(),
            mode,
        });
    }
    let mut text = String::new();
    Read::by_ref(&mut opened)
        .take(1 << 16)
        .read_to_string(&mut text)
        .map_err(failed)?;
    Ok(text)
}

/// Writes a file that only this user can read, from its first byte on, and gives it its name when it is whole.
pub(super) fn write_private(file: &Path, content: &str) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let beside = crate::files::beside(file, &format!("{}.partial", std::process::id()));
    let _ = fs::remove_file(&beside);
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    out.write_all(content.as_bytes())?;
    out.sync_all()?;
    fs::rename(&beside, file)
}

/// From the kernel's generator.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_goes_through_a_file_that_others_cannot_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        let secret = Secret::new().unwrap();
        write_private(&file, &secret.to_hex()).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        assert!(Secret::from_file(&file).unwrap() == secret);
        assert!(Secret::new().unwrap() != secret);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = Secret::from_file(&file).unwrap_err().to_string();
        assert!(
            refused.contains("can be read by others than its owner (mode 640)"),
            "{refused}"
        );
        assert!(Secret::from_hex("abc").is_err());
        assert!(!format!("{secret:?}").contains(&secret.to_hex()[..8]));
    }
}
