//! The cache folder of one repository, as `huggingface_hub` lays it out, so that either finds what the other brought:
//!
//! ```text
//! models--org--name/blobs/<checksum>            content; <checksum>.incomplete while it comes
//! models--org--name/snapshots/<commit>/<file>   links to blobs
//! models--org--name/refs/<revision>             the commit a branch or tag pointed to
//! .locks/models--org--name/<checksum>.lock      held while a blob comes
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ring::digest;

use super::{Checksum, HubError, RemoteFile, is_hex};

/// Where one repository's files lie.
#[derive(Debug)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Cache { path, source }
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self {
            locks: cache_dir.join(".locks").join(&name),
            folder: cache_dir.join(name),
        }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.folder.join("blobs").join(file.checksum.hex())
    }

    /// A blob of the right size; its content was checked when it was brought.
    pub(super) fn has_blob(&self, file: &RemoteFile) -> bool {
        fs::metadata(self.blob(file)).is_ok_and(|metadata| metadata.len() == file.size_bytes)
    }

    /// The commit `revision` names, as far as the cache knows.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_hex(revision, 40) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_hex(commit, 40))
    }

    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        replace(&path, |temporary| fs::write(temporary, commit))
    }

    /// Waits until no other process brings this file. The lock ends with the returned file.
    pub(super) fn lock(&self, file: &RemoteFile) -> Result<File, HubError> {
        let path = self.locks.join(format!("{}.lock", file.checksum.hex()));
        create_parent(&path)?;
        let lock = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(at(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                tracing::info!(file = file.name, "another process downloads this file; waiting for it");
                lock.lock().map_err(at(&path))?;
            }
            // Some network file systems have no locks. Without one, two processes may both download, and the rename at
            // the end keeps the result right.
            Err(TryLockError::Error(error)) => tracing::warn!(%error, path = %path.display(), "no lock"),
        }
        Ok(lock)
    }

    /// What came of `file` so far.
    pub(super) fn open_partial(&self, file: &RemoteFile) -> Result<Partial, HubError> {
        let target = self.blob(file);
        let path = target.with_extension("incomplete");
        create_parent(&path)?;
        let handle = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)
            .map_err(at(&path))?;
        let mut partial = Partial {
            handle,
            path,
            target,
            len: 0,
            digest: start_digest(file),
        };
        partial.read_existing(file)?;
        Ok(partial)
    }

    pub(super) fn link(&self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(&file.name);
        let target = Path::new("../../blobs").join(file.checksum.hex());
        if fs::read_link(&path).is_ok_and(|existing| existing == target) {
            return Ok(());
        }
        create_parent(&path)?;
        replace(&path, |temporary| std::os::unix::fs::symlink(&target, temporary))
    }
}

fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().expect("cache paths have a parent");
    fs::create_dir_all(parent).map_err(at(parent))
}

/// Makes a file appear at `path` whole, whoever looks or writes at the same time.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), HubError> {
    // Threads of one process write at the same time too.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().expect("cache paths name a file").to_string_lossy();
    let write = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.{}.{write}", std::process::id()));
    let made = make(&temporary).and_then(|()| fs::rename(&temporary, path));
    made.map_err(|source| {
        // Best effort: the rename's own error is the one to tell.
        let _ = fs::remove_file(&temporary);
        HubError::Cache {
            path: path.to_owned(),
            source,
        }
    })
}

/// A blob in the making: its bytes so far and their running checksum.
pub(super) struct Partial {
    handle: File,
    path: PathBuf,
    target: PathBuf,
    len: u64,
    digest: digest::Context,
}

fn start_digest(file: &RemoteFile) -> digest::Context {
    match file.checksum {
        Checksum::Sha256(_) => digest::Context::new(&digest::SHA256),
        Checksum::GitSha1(_) => {
            let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", file.size_bytes).as_bytes());
            context
        }
    }
}

impl Partial {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn read_existing(&mut self, file: &RemoteFile) -> Result<(), HubError> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.handle.read(&mut buffer).map_err(at(&self.path))? {
                0 => break,
                read => {
                    self.digest.update(&buffer[..read]);
                    self.len += read as u64;
                }
            }
        }
        if self.len > file.size_bytes {
            self.restart(file)
        } else {
            Ok(())
        }
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.handle.write_all(bytes).map_err(at(&self.path))?;
        self.digest.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn restart(&mut self, file: &RemoteFile) -> Result<(), HubError> {
        self.handle
            .set_len(0)
            .and_then(|()| self.handle.rewind())
            .map_err(at(&self.path))?;
        self.len = 0;
        self.digest = start_digest(file);
        Ok(())
    }

    /// Checks the content and gives it its final name; a damaged one is removed.
    pub(super) fn finish(self, file: &RemoteFile) -> Result<(), HubError> {
        let actual: String = self
            .digest
            .finish()
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        if actual != file.checksum.hex() {
            fs::remove_file(&self.path).map_err(at(&self.path))?;
            let expected = file.checksum.hex().to_owned();
            return Err(HubError::Checksum {
                file: file.name.clone(),
                expected,
                actual,
            });
        }
        self.handle
            .sync_all()
            .and_then(|()| fs::rename(&self.path, &self.target))
            .map_err(at(&self.path))
    }
}
