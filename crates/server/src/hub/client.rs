//! The hub's HTTP interface: describes repositories and opens files. The token goes to the hub's own host alone.

use std::io::Read;
use std::time::Duration;

use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::{Checksum, HubError, RemoteFile, is_hex, is_plain_file_name};
use crate::config::{HubConfig, Token};
use crate::https;

const USER_AGENT: &str = concat!("lapidary/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that sends nothing for this long is taken for gone; the transfer goes on over a new connection.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// The hub redirects to a renamed repository, then to its storage.
const MAX_REDIRECTS: u32 = 5;
const MAX_DESCRIPTION_BYTES: u64 = 64 << 20;

/// Talks to the hub about one repository.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
    repo: String,
}

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Repository {
    pub(super) commit: String,
    files: Vec<Sibling>,
}

#[derive(Debug, serde::Deserialize)]
struct Description {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Debug, serde::Deserialize)]
struct LargeFile {
    sha256: Option<String>,
}

impl Repository {
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.rfilename == name)
    }

    /// `None` when the description lacks size or checksum: some mirrors leave them out.
    pub(super) fn file(&self, name: &str) -> Option<RemoteFile> {
        let file = self.files.iter().find(|file| file.rfilename == name)?;
        let hex = match &file.lfs {
            Some(lfs) => lfs.sha256.as_deref()?,
            None => file.blob_id.as_deref()?,
        };
        Some(RemoteFile {
            name: name.to_owned(),
            size_bytes: file.size?,
            checksum: Checksum::from_hex(hex)?,
        })
    }
}

/// The bytes of a file from `offset` on.
pub(super) struct OpenFile {
    pub(super) offset: u64,
    pub(super) reader: Box<dyn Read>,
}

impl Client {
    pub(super) fn new(config: &HubConfig, repo: &str) -> Result<Self, HubError> {
        let tls = https::trusting(config.ca_bundle.as_deref()).map_err(|source| HubError::Cache {
            path: config.ca_bundle.clone().unwrap_or_default(),
            source,
        })?;
        let agent = Agent::config_builder()
            .tls_config(tls)
            .user_agent(USER_AGENT)
            .http_status_as_error(false)
            // Followed here, so that the token cannot travel along.
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            .build()
            .new_agent();
        Ok(Self {
            agent,
            endpoint: config.endpoint.clone(),
            token: config.token.clone(),
            repo: repo.to_owned(),
        })
    }

    pub(super) fn repo(&self) -> &str {
        &self.repo
    }

    /// What `revision` points to and the files it has.
    pub(super) fn describe(&self, revision: &str) -> Result<Repository, HubError> {
        let quoted = revision.replace('/', "%2F");
        let url = format!(
            "{}/api/models/{}/revision/{quoted}?blobs=true",
            self.endpoint, self.repo
        );
        let response = self.send(&Method::GET, &url, None, true)?;
        if !response.status().is_success() {
            return Err(self.fault(&url, revision, &response));
        }
        let body = response
            .into_body()
            .into_with_config()
            .limit(MAX_DESCRIPTION_BYTES)
            .read_to_vec();
        let body = body.map_err(|source| HubError::Unreachable {
            url: url.clone(),
            source: Box::new(source),
        })?;
        let description: Description = serde_json::from_slice(&body)
            .map_err(|error| self.unusable(format!("{url} answered with something else ({error})")))?;
        if !is_hex(&description.sha, 40) {
            return Err(self.unusable(format!("{:?} is no commit", description.sha)));
        }
        let files = description
            .siblings
            .into_iter()
            .filter(|file| is_plain_file_name(&file.rfilename))
            .collect();
        Ok(Repository {
            commit: description.sha,
            files,
        })
    }

    /// Size and checksum of one file, from the headers of its address.
    pub(super) fn describe_file(&self, commit: &str, name: &str) -> Result<RemoteFile, HubError> {
        let url = self.address(commit, name);
        let response = self.send(&Method::HEAD, &url, None, false)?;
        if !(response.status().is_success() || response.status().is_redirection()) {
            return Err(self.fault(&url, commit, &response));
        }
        let headers = response.headers();
        let either = |linked: &str, plain: &str| text(headers, linked).or_else(|| text(headers, plain));
        let etag = either("x-linked-etag", "etag").unwrap_or_default();
        let checksum = Checksum::from_hex(etag.trim_start_matches("W/").trim_matches('"'));
        let size = either("x-linked-size", "content-length").and_then(|size| size.parse().ok());
        match (checksum, size) {
            (Some(checksum), Some(size_bytes)) => Ok(RemoteFile {
                name: name.to_owned(),
                size_bytes,
                checksum,
            }),
            _ => Err(self.unusable(format!(
                "{url} has no size or no checksum, so that nothing could check the file"
            ))),
        }
    }

    /// Opens a file at `offset`, or at 0 where the server cannot. No `If-Range` is needed: partial files are named by
    /// their checksum, and the address by its commit.
    pub(super) fn open(&self, commit: &str, name: &str, offset: u64) -> Result<OpenFile, HubError> {
        let url = self.address(commit, name);
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        let response = self.send(&Method::GET, &url, range.as_deref(), true)?;
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(response.headers(), offset) => offset,
            StatusCode::OK => 0,
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT if offset > 0 => {
                return self.open(commit, name, 0);
            }
            _ => return Err(self.fault(&url, commit, &response)),
        };
        Ok(OpenFile {
            offset,
            reader: Box::new(response.into_body().into_reader()),
        })
    }

    fn address(&self, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{name}", self.endpoint, self.repo)
    }

    /// Sends a request and follows redirects: all of them, or only those that stay on the hub (`leave_hub` false), whose
    /// answer then is the redirect that would leave.
    fn send(
        &self,
        method: &Method,
        url: &str,
        range: Option<&str>,
        leave_hub: bool,
    ) -> Result<Response<Body>, HubError> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send_once(method, &url, range)?;
            let location = text(response.headers(), "location").filter(|_| response.status().is_redirection());
            let Some(location) = location else { return Ok(response) };
            let target = resolve(&url, location).ok_or_else(|| self.unusable(format!("redirected to {location:?}")))?;
            if !leave_hub && !self.is_own(&target) {
                return Ok(response);
            }
            url = target;
        }
        Err(self.unusable(format!("more than {MAX_REDIRECTS} redirects, the last to {url}")))
    }

    fn send_once(&self, method: &Method, url: &str, range: Option<&str>) -> Result<Response<Body>, HubError> {
        let unreachable = |source| HubError::Unreachable {
            url: without_query(url),
            source: Box::new(source),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(url)
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = self.token.as_ref().filter(|_| self.is_own(url)) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        let request = request.body(()).map_err(|error| unreachable(error.into()))?;
        self.agent.run(request).map_err(unreachable)
    }

    /// Same scheme, host and port as the hub.
    fn is_own(&self, url: &str) -> bool {
        let origin = |url: &str| {
            url.parse::<Uri>()
                .ok()
                .map(|uri| (uri.scheme().cloned(), uri.authority().cloned()))
        };
        origin(url).is_some_and(|of_url| Some(of_url) == origin(&self.endpoint))
    }

    fn fault(&self, url: &str, revision: &str, response: &Response<Body>) -> HubError {
        let (endpoint, repo) = (self.endpoint.clone(), self.repo.clone());
        let code = text(response.headers(), "x-error-code").unwrap_or_default();
        match (response.status().as_u16(), code, self.token.is_some()) {
            (401 | 403, "GatedRepo", false) => HubError::Gated { endpoint, repo },
            (401 | 403, "GatedRepo", true) | (403, _, true) => HubError::NoAccess { endpoint, repo },
            (401, "RepoNotFound", true) => HubError::NoRepository { endpoint, repo },
            (401, _, true) => HubError::TokenRefused { endpoint },
            (404, "RevisionNotFound", _) => HubError::NoRevision {
                repo,
                revision: revision.to_owned(),
            },
            (401, ..) | (404, "RepoNotFound", false) => HubError::TokenNeeded { endpoint, repo },
            (404, "RepoNotFound" | "", true) => HubError::NoRepository { endpoint, repo },
            (404, "", false) => HubError::TokenNeeded { endpoint, repo },
            (status, ..) => HubError::Status {
                url: without_query(url),
                status,
                note: text(response.headers(), "x-error-message").map(str::to_owned),
            },
        }
    }

    fn unusable(&self, reason: String) -> HubError {
        HubError::BadDescription {
            repo: self.repo.clone(),
            reason,
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Signed addresses carry secrets in their query.
fn without_query(url: &str) -> String {
    url.split('?').next().unwrap_or_default().to_owned()
}

fn starts_at(headers: &HeaderMap, offset: u64) -> bool {
    text(headers, "content-range").is_some_and(|range| range.starts_with(&format!("bytes {offset}-")))
}

/// The absolute address of a `Location` header.
fn resolve(base: &str, location: &str) -> Option<String> {
    if location.starts_with("https://") || location.starts_with("http://") {
        return Some(location.to_owned());
    }
    let base: Uri = base.parse().ok()?;
    let scheme = base.scheme_str()?;
    match location.strip_prefix("//") {
        Some(rest) => Some(format!("{scheme}://{rest}")),
        None if location.starts_with('/') => Some(format!("{scheme}://{}{location}", base.authority()?)),
        None => None,
    }
}
