//! API keys: compared in constant time, kept as digests, replaced when their file changes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use ring::hmac;
use ring::rand::SystemRandom;

use super::budget::{Budget, KeyLimits};
use crate::config::Token;
use crate::error::ApiError;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("cannot read the key file {}", path.display())]
    Unreadable {
        /// Of `--api-key-file`.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It would lock everybody out.
    #[error("the key file {} holds no key", path.display())]
    Empty {
        /// Of `--api-key-file`.
        path: PathBuf,
    },
}

/// The keys that are good at present.
#[derive(Debug)]
pub struct ApiKeys {
    /// Of this process: what the digests are worth to nobody else.
    digest_key: hmac::Key,
    limits: KeyLimits,
    typed: Vec<Token>,
    file: Option<PathBuf>,
    current: RwLock<Vec<Arc<Key>>>,
}

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    digest: hmac::Tag,
    pub(super) budget: Arc<Budget>,
}

impl ApiKeys {
    /// The keys typed and those of the file, which has one a line; empty lines and those that begin with `#` are none.
    ///
    /// # Errors
    /// The file cannot be used.
    ///
    /// # Panics
    /// The system has no randomness.
    pub fn new(typed: Vec<Token>, file: Option<PathBuf>, limits: KeyLimits) -> Result<Self, KeyFileError> {
        let digest_key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).expect("the system is random");
        let keys = Self {
            digest_key,
            limits,
            typed,
            file,
            current: RwLock::default(),
        };
        keys.reload()?;
        Ok(keys)
    }

    /// The file that [`ApiKeys::reload`] reads.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What each key may use.
    pub(super) fn limits(&self) -> &KeyLimits {
        &self.limits
    }

    /// Reads the file again; on an error the keys stay as they are. A key that stays keeps its budget.
    pub(crate) fn reload(&self) -> Result<(), KeyFileError> {
        let mut texts: Vec<String> = self.typed.iter().map(|key| key.expose().to_owned()).collect();
        if let Some(path) = &self.file {
            let read = read_file(path)?;
            if read.is_empty() {
                return Err(KeyFileError::Empty { path: path.clone() });
            }
            texts.extend(read);
        }
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let mut keys: Vec<Arc<Key>> = Vec::with_capacity(texts.len());
        for text in &texts {
            let digest = hmac::sign(&self.digest_key, text.as_bytes());
            if find(&keys, &digest).is_none() {
                let key = find(&current, &digest).cloned();
                keys.push(key.unwrap_or_else(|| Arc::new(Key::new(digest))));
            }
        }
        *current = keys;
        Ok(())
    }

    /// The key that a client sent.
    pub(super) fn find(&self, sent: Option<&[u8]>) -> Result<Arc<Key>, ApiError> {
        let sent = sent.ok_or(ApiError::Unauthorized { has_key: false })?;
        let digest = hmac::sign(&self.digest_key, sent);
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        find(&current, &digest)
            .cloned()
            .ok_or(ApiError::Unauthorized { has_key: true })
    }
}

impl Key {
    fn new(digest: hmac::Tag) -> Self {
        Self {
            digest,
            budget: Arc::default(),
        }
    }
}

/// Looks at all keys and at every byte of each, whatever matches: time tells nothing.
fn find<'a>(keys: &'a [Arc<Key>], digest: &hmac::Tag) -> Option<&'a Arc<Key>> {
    let mut found = None;
    for key in keys {
        let pairs = key.digest.as_ref().iter().zip(digest.as_ref());
        let difference = pairs.fold(0, |difference, (a, b)| std::hint::black_box(difference | (a ^ b)));
        if difference == 0 {
            found = Some(key);
        }
    }
    found
}

fn read_file(path: &Path) -> Result<Vec<String>, KeyFileError> {
    let text = fs::read_to_string(path).map_err(|source| KeyFileError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let lines = text.lines().map(str::trim);
    let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(keys.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_known(keys: &ApiKeys, key: &str) -> bool {
        keys.find(Some(key.as_bytes())).is_ok()
    }

    #[test]
    fn a_file_that_changed_replaces_its_keys_and_a_bad_one_changes_nothing() {
        let path = std::env::temp_dir().join(format!("lapidary-keys-{}", std::process::id()));
        fs::write(&path, "# team a\nold\n\n  stays  \n").unwrap();
        let limits = KeyLimits::default();
        let keys = ApiKeys::new(vec![Token::new("typed")], Some(path.clone()), limits).unwrap();
        assert!(is_known(&keys, "old") && is_known(&keys, "stays") && is_known(&keys, "typed"));
        assert!(!is_known(&keys, "# team a") && !is_known(&keys, ""));
        let before = keys.find(Some(b"stays")).unwrap();
        fs::write(&path, "new\nstays").unwrap();
        keys.reload().unwrap();
        assert!(is_known(&keys, "new") && is_known(&keys, "typed") && !is_known(&keys, "old"));
        assert!(
            Arc::ptr_eq(&before, &keys.find(Some(b"stays")).unwrap()),
            "its budget is lost"
        );
        fs::write(&path, "# none\n").unwrap();
        assert!(matches!(keys.reload(), Err(KeyFileError::Empty { .. })));
        fs::remove_file(&path).unwrap();
        assert!(matches!(keys.reload(), Err(KeyFileError::Unreadable { .. })));
        assert!(is_known(&keys, "new"));
    }

    #[test]
    fn keys_are_never_printed() {
        let keys = ApiKeys::new(vec![Token::new("hush")], None, KeyLimits::default()).unwrap();
        assert!(!format!("{keys:?}").contains("hush"));
    }
}
