//! Who may come in, and how: keys, browsers, TLS.

use std::path::{Path, PathBuf};

use axum::http::HeaderValue;

use super::{ConfigError, Environment, Token, given, invalid, require};
use crate::access::{Access, ApiKeys, Cors, KeyLimits};
use crate::cli::{CertificateRequirement, Settings};
use crate::units::NameList;

/// Who may come in.
#[derive(Debug, Clone)]
pub struct AccessConfig {
    keys: Vec<Token>,
    key_file: Option<PathBuf>,
    limits: KeyLimits,
    open_metrics: bool,
    has_page: bool,
    cors: Cors,
    root_path: String,
}

/// Where certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM, the server's own certificate first.
    pub certfile: PathBuf,
    /// PEM.
    pub keyfile: PathBuf,
    /// What is asked of clients; absent: nothing.
    pub clients: Option<ClientCertificates>,
}

/// Which certificates clients show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificates {
    /// Whose certificates are good, PEM.
    pub ca_certs: PathBuf,
    /// Without one there is no connection.
    pub is_required: bool,
}

impl AccessConfig {
    pub(super) fn new(settings: &Settings, environment: &Environment) -> Result<Self, ConfigError> {
        let of_vllm = || environment.get("VLLM_API_KEY").map(|key| vec![Token::new(key)]);
        let keys = settings.api_key.clone().or_else(of_vllm).unwrap_or_default();
        let is_sendable =
            |key: &Token| !key.expose().is_empty() && key.expose().bytes().all(|byte| byte.is_ascii_graphic());
        require(
            keys.iter().all(is_sendable),
            "api-key",
            "a key is empty or has characters that no header can hold",
        )?;
        if let Some(path) = settings.api_key_file.as_ref() {
            require_file(path, "api-key-file")?;
        }
        let has_keys = !keys.is_empty() || settings.api_key_file.is_some();
        let limits = KeyLimits {
            max_concurrent_requests: settings.max_concurrency_per_key,
            tokens_per_minute: settings.tokens_per_minute_per_key,
        };
        for (limit, name) in [
            (limits.max_concurrent_requests.map(u64::from), "max-concurrency-per-key"),
            (limits.tokens_per_minute, "tokens-per-minute-per-key"),
        ] {
            require(limit != Some(0), name, "must be at least 1")?;
            require(
                limit.is_none() || has_keys,
                name,
                "has no effect without api-key or api-key-file",
            )?;
        }
        Ok(Self {
            keys,
            key_file: settings.api_key_file.clone(),
            limits,
            open_metrics: given(settings.unauthenticated_metrics),
            has_page: given(settings.ui),
            cors: cors(settings)?,
            root_path: root_path(settings)?,
        })
    }

    /// Reads the key file.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn open(&self) -> Result<Access, ConfigError> {
        let has_keys = !self.keys.is_empty() || self.key_file.is_some();
        let keys = has_keys.then(|| ApiKeys::new(self.keys.clone(), self.key_file.clone(), self.limits));
        Ok(Access {
            keys: keys.transpose().map_err(ConfigError::KeyFile)?,
            open_metrics: self.open_metrics,
            has_page: self.has_page,
            cors: self.cors.clone(),
            root_path: self.root_path.clone(),
        })
    }
}

impl TlsConfig {
    pub(super) fn new(settings: &Settings) -> Result<Option<Self>, ConfigError> {
        let clients = client_certificates(settings)?;
        match (settings.ssl_certfile.clone(), settings.ssl_keyfile.clone()) {
            (None, None) if clients.is_some() => Err(invalid("ssl-certfile", "is needed with ssl-ca-certs")),
            (None, None) => Ok(None),
            (Some(certfile), Some(keyfile)) => {
                require_file(&certfile, "ssl-certfile")?;
                require_file(&keyfile, "ssl-keyfile")?;
                Ok(Some(Self {
                    certfile,
                    keyfile,
                    clients,
                }))
            }
            (Some(_), None) => Err(invalid("ssl-keyfile", "is needed with ssl-certfile")),
            (None, Some(_)) => Err(invalid("ssl-certfile", "is needed with ssl-keyfile")),
        }
    }
}

fn client_certificates(settings: &Settings) -> Result<Option<ClientCertificates>, ConfigError> {
    // Whoever names a CA wants it to count: unlike in Python, it does unless told otherwise.
    let is_required = match (&settings.ssl_ca_certs, settings.ssl_cert_reqs) {
        (Some(_), None | Some(CertificateRequirement::Required)) => true,
        (Some(_), Some(CertificateRequirement::Optional)) => false,
        (_, Some(CertificateRequirement::None)) | (None, None) => return Ok(None),
        (None, Some(_)) => return Err(invalid("ssl-ca-certs", "is needed to ask for certificates of clients")),
    };
    let Some(ca_certs) = settings.ssl_ca_certs.clone() else {
        return Ok(None);
    };
    require_file(&ca_certs, "ssl-ca-certs")?;
    Ok(Some(ClientCertificates { ca_certs, is_required }))
}

fn require_file(path: &Path, key: &'static str) -> Result<(), ConfigError> {
    if path.is_file() {
        return Ok(());
    }
    Err(invalid(key, format!("there is no file {}", path.display())))
}

fn cors(settings: &Settings) -> Result<Cors, ConfigError> {
    let origin = |name: &str| {
        let is_origin = name.contains("://") && !name.ends_with('/');
        HeaderValue::from_str(name).ok().filter(|_| is_origin)
    };
    Ok(Cors {
        origins: names("allowed-origins", settings.allowed_origins.as_ref(), origin)?,
        methods: names("allowed-methods", settings.allowed_methods.as_ref(), |name| {
            name.parse().ok()
        })?,
        headers: names("allowed-headers", settings.allowed_headers.as_ref(), |name| {
            name.parse().ok()
        })?,
        allow_credentials: given(settings.allow_credentials),
    })
}

/// `None` where everything is allowed.
fn names<T>(
    key: &'static str,
    list: Option<&NameList>,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<Vec<T>>, ConfigError> {
    let Some(NameList(names)) = list.filter(|NameList(names)| !names.iter().any(|name| name == "*")) else {
        return Ok(None);
    };
    let parsed = names
        .iter()
        .map(|name| parse(name).ok_or_else(|| invalid(key, format!("{name:?} is none"))));
    parsed.collect::<Result<_, _>>().map(Some)
}

fn root_path(settings: &Settings) -> Result<String, ConfigError> {
    let path = settings.root_path.as_deref().unwrap_or_default().trim_end_matches('/');
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    require(
        path.is_empty() || (path.starts_with('/') && !path.contains("//") && path.bytes().all(is_plain)),
        "root-path",
        "must be a path like /gem",
    )?;
    Ok(path.to_owned())
}
