//! Models from the Hugging Face hub: downloads what serving needs into the cache `huggingface_hub` uses, and finds it
//! there again.
//!
//! Blocking, for a thread of its own. Written on a plain HTTP client because the `hf-hub` crate brings 140 others.

mod cache;
mod client;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cache::{Partial, RepoCache};
use client::{Client, Repository};

use crate::config::HubConfig;
use crate::logging::CauseChain;

/// Attempts in a row that bring no byte before a transfer is given up.
const MAX_FUTILE_ATTEMPTS: u32 = 5;
/// Wait after the first futile attempt; doubles each time.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// Files besides weights that the loader reads. All but the first two may be absent.
const METADATA_FILES: [&str; 9] = [
    CONFIG,
    TOKENIZER,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "hf_quant_config.json",
];

/// Told the bytes done and the bytes in all.
pub(crate) type OnProgress<'a> = &'a dyn Fn(u64, u64);

/// Why a model cannot be had. Messages say what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No such repository for someone without a token.
    #[error(
        "{endpoint} knows no public repository {repo:?}: check the spelling; if it is private or gated, create a token \
         at {endpoint}/settings/tokens and set HF_TOKEN"
    )]
    TokenNeeded {
        /// Of the hub.
        endpoint: String,
        /// `org/name`.
        repo: String,
    },
    /// The token is no good.
    #[error(
        "{endpoint} refuses the token (from HF_TOKEN, or the file that `huggingface-cli login` wrote): it is mistyped, \
         expired or revoked; create another at {endpoint}/settings/tokens"
    )]
    TokenRefused {
        /// Of the hub.
        endpoint: String,
    },
    /// A licence must be accepted, and no token shows who asks.
    #[error(
        "{repo} is gated: accept its licence at {endpoint}/{repo}, create a token at {endpoint}/settings/tokens and set \
         HF_TOKEN"
    )]
    Gated {
        /// Of the hub.
        endpoint: String,
        /// `org/name`.
        repo: String,
    },
    /// A licence must be accepted, and the token's owner has not, or the token may not use it.
    #[error(
        "{repo} is gated and the token has no access: accept the licence at {endpoint}/{repo} with the token's account; \
         a fine-grained token also needs the permission to read public gated repositories"
    )]
    NoAccess {
        /// Of the hub.
        endpoint: String,
        /// `org/name`.
        repo: String,
    },
    /// The token's owner sees no such repository.
    #[error("{endpoint} knows no repository {repo:?}, or the token may not see it: check the spelling")]
    NoRepository {
        /// Of the hub.
        endpoint: String,
        /// `org/name`.
        repo: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo} has no branch, tag or commit {revision:?}")]
    NoRevision {
        /// `org/name`.
        repo: String,
        /// `--revision`.
        revision: String,
    },
    /// It is not a model we can load.
    #[error("{repo} has no {what}: it is no transformers checkpoint with safetensors weights")]
    NoModel {
        /// `org/name`.
        repo: String,
        /// What is missing.
        what: &'static str,
    },
    /// A name or checksum of the repository cannot be used.
    #[error("the hub's description of {repo} is unusable: {reason}")]
    BadDescription {
        /// `org/name`.
        repo: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Downloads are off and the cache lacks something.
    #[error("{repo} at {revision:?} is not complete in {}: no {missing}; downloads are off (HF_HUB_OFFLINE)", cache_dir.display())]
    NotCached {
        /// `org/name`.
        repo: String,
        /// `--revision`.
        revision: String,
        /// Where it was looked for.
        cache_dir: PathBuf,
        /// The first thing missing.
        missing: String,
    },
    /// What came is not what the hub announced.
    #[error("{file} is damaged: its checksum is {actual}, the hub announced {expected}; the download was thrown away")]
    Checksum {
        /// In the repository.
        file: String,
        /// By the hub.
        expected: String,
        /// Of the bytes that came.
        actual: String,
    },
    /// An answer that is neither a file nor a known fault.
    #[error("{url} answered {status}{}", note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default())]
    Status {
        /// Asked.
        url: String,
        /// HTTP status.
        status: u16,
        /// The hub's own words.
        note: Option<String>,
    },
    /// No answer.
    #[error("cannot reach {url}")]
    Unreachable {
        /// Asked.
        url: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The transfer broke, again and again.
    #[error("the transfer of {file} broke {MAX_FUTILE_ATTEMPTS} times without progress")]
    Interrupted {
        /// In the repository.
        file: String,
        /// The last time.
        #[source]
        source: io::Error,
    },
    /// The cache cannot be written or read.
    #[error("cannot use {}", path.display())]
    Cache {
        /// In the cache.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl HubError {
    /// Whether trying again may help.
    fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Interrupted { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..),
            _ => false,
        }
    }
}

/// Whether `name` can be a repository: `org/name` in the hub's alphabet, and safe as part of a path.
#[must_use]
pub(crate) fn is_repository_name(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("..")
            && !part.contains("--")
    };
    name.len() <= 96
        && name
            .split_once('/')
            .is_some_and(|(org, name)| is_part(org) && is_part(name))
}

/// Whether `name` can be a branch, tag or commit, and is safe as part of a path.
#[must_use]
pub(crate) fn is_revision_name(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    name.len() <= 200 && name.split('/').all(is_part)
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Names of the repository's own top folder that are safe to make files of.
fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// The folder that holds checkpoint `repo`, downloaded as far as the cache lacks it.
///
/// # Errors
/// See [`HubError`].
pub(crate) fn fetch(repo: &str, config: &HubConfig, on_progress: OnProgress<'_>) -> Result<PathBuf, HubError> {
    fetch_with_backoff(repo, config, on_progress, FIRST_BACKOFF)
}

fn fetch_with_backoff(
    repo: &str,
    config: &HubConfig,
    on_progress: OnProgress<'_>,
    first_backoff: Duration,
) -> Result<PathBuf, HubError> {
    let cache = RepoCache::new(&config.cache_dir, repo);
    if config.offline {
        return find_cached(repo, config, &cache);
    }
    let client = Client::new(config, repo)?;
    let retries = Retries { first_backoff };
    // A restart must not depend on the hub when everything is here already.
    let cached = find_cached(repo, config, &cache).ok();
    if let Some(folder) = cached.as_ref().filter(|_| is_hex(&config.revision, 40)) {
        // A commit never changes: there is nothing to ask.
        return Ok(folder.clone());
    }
    let repository = match (&cached, client.describe(&config.revision)) {
        (_, Ok(repository)) => repository,
        (Some(folder), Err(error)) if error.is_transient() => {
            let error = format!("{:#}", CauseChain(&error));
            tracing::warn!(repo, error, "the hub does not answer: using the cached files");
            return Ok(folder.clone());
        }
        (None, Err(error)) if error.is_transient() => retries.run(|| client.describe(&config.revision))?,
        (_, Err(error)) => return Err(error),
    };
    let mut download = Download {
        client: &client,
        cache: &cache,
        retries,
        on_progress,
        done: 0,
        total: 0,
    };
    download.repository(&repository)?;
    cache.write_ref(&config.revision, &repository.commit)?;
    Ok(cache.snapshot(&repository.commit))
}

fn find_cached(repo: &str, config: &HubConfig, cache: &RepoCache) -> Result<PathBuf, HubError> {
    let lacks = |missing: &str| HubError::NotCached {
        repo: repo.to_owned(),
        revision: config.revision.clone(),
        cache_dir: config.cache_dir.clone(),
        missing: missing.to_owned(),
    };
    let commit = cache
        .commit_of(&config.revision)
        .ok_or_else(|| lacks("record of that revision"))?;
    let folder = cache.snapshot(&commit);
    match first_missing(&folder) {
        Some(missing) => Err(lacks(&missing)),
        None => Ok(folder),
    }
}

/// The first file without which `folder` is no checkpoint.
fn first_missing(folder: &Path) -> Option<String> {
    let lacks = |name: &str| !folder.join(name).is_file();
    if let Some(missing) = [CONFIG, TOKENIZER].into_iter().find(|name| lacks(name)) {
        return Some(missing.to_owned());
    }
    match std::fs::read(folder.join(WEIGHTS_INDEX)) {
        Ok(index) => shards(&index).map_or(Some(WEIGHTS_INDEX.to_owned()), |names| {
            names.into_iter().find(|n| lacks(n))
        }),
        Err(_) => lacks(WEIGHTS).then(|| WEIGHTS.to_owned()),
    }
}

/// The files a weight index names; `None` when it is no such index.
fn shards(index: &[u8]) -> Option<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).ok()?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    (!names.is_empty() && names.iter().all(|name| is_plain_file_name(name))).then_some(names)
}

/// A file of a repository: all that is needed to get and check it.
#[derive(Debug, Clone)]
struct RemoteFile {
    name: String,
    size_bytes: u64,
    checksum: Checksum,
}

/// What the hub says of a file's content. Its hex form names the blob in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Checksum {
    /// Of files in large file storage.
    Sha256(String),
    /// Git's own, of files in the repository: SHA-1 of `blob <size>\0` and the content.
    GitSha1(String),
}

impl Checksum {
    fn from_hex(hex: &str) -> Option<Self> {
        match hex {
            _ if is_hex(hex, 64) => Some(Self::Sha256(hex.to_owned())),
            _ if is_hex(hex, 40) => Some(Self::GitSha1(hex.to_owned())),
            _ => None,
        }
    }

    fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitSha1(hex) => hex,
        }
    }
}

/// How often to try, and how long to wait between.
#[derive(Debug, Clone, Copy)]
struct Retries {
    first_backoff: Duration,
}

impl Retries {
    fn run<T>(self, mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
        let mut futile = 0;
        loop {
            match attempt() {
                Err(error) if error.is_transient() && futile + 1 < MAX_FUTILE_ATTEMPTS => {
                    self.pause(&mut futile, &error)
                }
                outcome => return outcome,
            }
        }
    }

    fn pause(self, futile: &mut u32, error: &HubError) {
        let backoff = self.first_backoff * 2u32.pow(*futile);
        *futile += 1;
        tracing::warn!(
            error = format!("{:#}", CauseChain(error)),
            attempt = *futile,
            ?backoff,
            "download failed; trying again"
        );
        std::thread::sleep(backoff);
    }
}

/// The transfer of one repository's files.
struct Download<'a> {
    client: &'a Client,
    cache: &'a RepoCache,
    retries: Retries,
    on_progress: OnProgress<'a>,
    done: u64,
    total: u64,
}

impl Download<'_> {
    fn repository(&mut self, repository: &Repository) -> Result<(), HubError> {
        let commit = &repository.commit;
        let mut small = Vec::new();
        for name in METADATA_FILES.into_iter().chain([WEIGHTS_INDEX]) {
            match repository.has(name) {
                true => small.push(self.describe(repository, name)?),
                false if name == CONFIG || name == TOKENIZER => {
                    return Err(HubError::NoModel {
                        repo: self.client.repo().to_owned(),
                        what: name,
                    });
                }
                false => {}
            }
        }
        self.announce(&small);
        for file in &small {
            self.file(commit, file)?;
        }
        let mut weights = Vec::new();
        for name in self.weight_names(repository)? {
            weights.push(self.describe(repository, &name)?);
        }
        self.announce(&weights);
        for file in &weights {
            self.file(commit, file)?;
        }
        Ok(())
    }

    fn announce(&mut self, files: &[RemoteFile]) {
        self.total += files.iter().map(|file| file.size_bytes).sum::<u64>();
        (self.on_progress)(self.done, self.total);
    }

    fn describe(&self, repository: &Repository, name: &str) -> Result<RemoteFile, HubError> {
        match repository.file(name) {
            Some(file) => Ok(file),
            None => self.retries.run(|| self.client.describe_file(&repository.commit, name)),
        }
    }

    fn weight_names(&self, repository: &Repository) -> Result<BTreeSet<String>, HubError> {
        let repo = || self.client.repo().to_owned();
        if !repository.has(WEIGHTS_INDEX) {
            return match repository.has(WEIGHTS) {
                true => Ok(BTreeSet::from([WEIGHTS.to_owned()])),
                false => Err(HubError::NoModel {
                    repo: repo(),
                    what: WEIGHTS,
                }),
            };
        }
        let path = self.cache.snapshot(&repository.commit).join(WEIGHTS_INDEX);
        let index = std::fs::read(&path).map_err(|source| HubError::Cache { path, source })?;
        let names = shards(&index).ok_or_else(|| HubError::BadDescription {
            repo: repo(),
            reason: format!("{WEIGHTS_INDEX} is malformed"),
        })?;
        match names.iter().find(|name| !repository.has(name)) {
            Some(absent) => Err(HubError::BadDescription {
                repo: repo(),
                reason: format!("{WEIGHTS_INDEX} names {absent}, which is not there"),
            }),
            None => Ok(names),
        }
    }

    /// Makes `file` part of the snapshot of `commit`.
    fn file(&mut self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        if !self.cache.has_blob(file) {
            let _lock = self.cache.lock(file)?;
            // Another process may have brought it while this one waited for the lock.
            if !self.cache.has_blob(file) {
                self.blob(commit, file)?;
            }
        }
        self.done += file.size_bytes;
        (self.on_progress)(self.done, self.total);
        self.cache.link(commit, file)
    }

    fn blob(&self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        let mut partial = self.cache.open_partial(file)?;
        let mut was_resumed = partial.len() > 0;
        let mut futile = 0;
        loop {
            let before = partial.len();
            match self.attempt(commit, file, &mut partial) {
                Ok(()) => match partial.finish(file) {
                    // Whoever left the beginning may have left rubbish: one more try from the start.
                    Err(HubError::Checksum { .. }) if was_resumed => {
                        was_resumed = false;
                        partial = self.cache.open_partial(file)?;
                    }
                    outcome => return outcome,
                },
                Err(error) if !error.is_transient() => return Err(error),
                Err(_) if partial.len() > before => futile = 0,
                Err(error) if futile + 1 >= MAX_FUTILE_ATTEMPTS => return Err(error),
                Err(error) => self.retries.pause(&mut futile, &error),
            }
        }
    }

    /// Appends what is missing of `file`, as far as the connection lasts.
    fn attempt(&self, commit: &str, file: &RemoteFile, partial: &mut Partial) -> Result<(), HubError> {
        if partial.len() == file.size_bytes {
            return Ok(());
        }
        let mut body = self.client.open(commit, &file.name, partial.len())?;
        if body.offset != partial.len() {
            partial.restart(file)?;
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            let interrupted = |source| HubError::Interrupted {
                file: file.name.clone(),
                source,
            };
            match body.reader.read(&mut buffer).map_err(interrupted)? {
                0 if partial.len() < file.size_bytes => return Err(interrupted(io::ErrorKind::UnexpectedEof.into())),
                0 => return Ok(()),
                read => partial.append(&buffer[..read])?,
            }
            if partial.len() > file.size_bytes {
                // Too much is as wrong as too little: the checksum will say so.
                return Ok(());
            }
            (self.on_progress)(self.done + partial.len(), self.total);
        }
    }
}

#[cfg(test)]
mod tests;
