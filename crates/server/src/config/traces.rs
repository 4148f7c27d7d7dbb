//! Where traces go.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use ureq::http::{HeaderName, HeaderValue, Uri};

use super::{ConfigError, Environment, Token, ca_bundle, invalid};
use crate::cli::Settings;

const KEY: &str = "otlp-traces-endpoint";
/// Where collectors take traces, by OTLP's definition.
const TRACES_PATH: &str = "/v1/traces";
/// Where they speak gRPC by custom.
const GRPC_PORT: u16 = 4317;

/// Where traces go, and as whose.
#[derive(Debug, Clone)]
pub struct TraceConfig {
    /// A URL with its path.
    pub endpoint: String,
    /// Sent with every request, keys of services among them.
    pub headers: Vec<(String, Token)>,
    /// What is said of this process.
    pub resource: Vec<(String, String)>,
    /// Which requests.
    pub sampler: Sampler,
    /// PEM file of the authorities to trust in place of the built-in ones.
    pub ca_bundle: Option<PathBuf>,
}

/// Which requests are traced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Where a client began the trace, its decision holds.
    pub follows_parent: bool,
    /// Of the others, this share, 0 to 1; chosen by the id, so that all who see a trace choose alike.
    pub share: f64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            follows_parent: true,
            share: 1.0,
        }
    }
}

impl Sampler {
    fn new(environment: &Environment) -> Result<Self, ConfigError> {
        let name = environment
            .get("OTEL_TRACES_SAMPLER")
            .unwrap_or("parentbased_always_on");
        let (follows_parent, of_roots) = match name.strip_prefix("parentbased_") {
            Some(of_roots) => (true, of_roots),
            None => (false, name),
        };
        let argument = environment.get("OTEL_TRACES_SAMPLER_ARG").unwrap_or("1");
        let share = match of_roots {
            "always_on" => Some(1.0),
            "always_off" => Some(0.0),
            "traceidratio" => argument.parse().ok().filter(|share| (0.0..=1.0).contains(share)),
            _ => None,
        };
        match share {
            Some(share) => Ok(Self { follows_parent, share }),
            None => {
                let reason =
                    format!("OTEL_TRACES_SAMPLER is {name:?} with {argument:?}, which is no sampler known here");
                Err(invalid(KEY, reason))
            }
        }
    }
}

impl TraceConfig {
    pub(super) fn new(settings: &Settings, environment: &Environment) -> Result<Option<Self>, ConfigError> {
        let Some(typed) = settings.otlp_traces_endpoint.as_deref() else {
            return Ok(None);
        };
        let of_both = |specific, general| environment.get(specific).or_else(|| environment.get(general));
        let headers = of_both("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS");
        let certificate = of_both(
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
        );
        Ok(Some(Self {
            endpoint: endpoint(typed)?,
            headers: headers.map_or(Ok(Vec::new()), read_headers)?,
            resource: resource(environment),
            sampler: Sampler::new(environment)?,
            ca_bundle: certificate.map(PathBuf::from).or_else(|| ca_bundle(environment)),
        }))
    }
}

/// The URL to post to: a collector's address alone means its usual path.
fn endpoint(typed: &str) -> Result<String, ConfigError> {
    let unusable = |reason: &str| invalid(KEY, format!("{typed:?} {reason}"));
    let uri: Uri = typed.parse().map_err(|_| unusable("is no URL"))?;
    match uri.scheme_str() {
        Some("http" | "https") if uri.host().is_some() => {}
        Some("grpc") => {
            return Err(unusable(
                "asks for gRPC; give the collector's HTTP address, whose port is 4318",
            ));
        }
        _ => return Err(unusable("must be an address like http://localhost:4318")),
    }
    if uri.port_u16() == Some(GRPC_PORT) {
        return Err(unusable("has the port for gRPC; collectors take HTTP on 4318"));
    }
    match uri.path() {
        "/" => Ok(format!("{}{TRACES_PATH}", typed.trim_end_matches('/'))),
        _ => Ok(typed.to_owned()),
    }
}

/// `a=1,b=2`, values percent-encoded, as OpenTelemetry writes lists in variables.
fn pairs(text: &str) -> impl Iterator<Item = (String, String)> {
    text.split(',').filter_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8_lossy();
        Some((key.trim().to_owned(), value.into_owned()))
    })
}

fn read_headers(text: &str) -> Result<Vec<(String, Token)>, ConfigError> {
    let header = |(name, value): (String, String)| {
        let is_sendable = name.parse::<HeaderName>().is_ok() && HeaderValue::from_str(&value).is_ok();
        // Without its value, which may be a secret.
        let fault = || {
            invalid(
                KEY,
                format!("OTEL_EXPORTER_OTLP_HEADERS: {name:?} is no header or has no valid value"),
            )
        };
        is_sendable.then(|| (name.clone(), Token::new(value))).ok_or_else(fault)
    };
    pairs(text).map(header).collect()
}

fn resource(environment: &Environment) -> Vec<(String, String)> {
    let mut resource: Vec<(String, String)> = pairs(environment.get("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default())
        .filter(|(key, _)| key != "service.version")
        .collect();
    resource.push(("service.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()));
    let named = environment.get("OTEL_SERVICE_NAME");
    if named.is_some() || resource.iter().all(|(key, _)| key != "service.name") {
        resource.retain(|(key, _)| key != "service.name");
        resource.push(("service.name".to_owned(), named.unwrap_or("lapidary").to_owned()));
    }
    resource
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(endpoint: &str, environment: &Environment) -> Result<TraceConfig, ConfigError> {
        let settings = Settings {
            otlp_traces_endpoint: Some(endpoint.to_owned()),
            ..Settings::defaults()
        };
        TraceConfig::new(&settings, environment).map(|config| config.expect("there is an endpoint"))
    }

    #[test]
    fn an_address_means_its_usual_path() {
        for (typed, meant) in [
            ("http://collector:4318", "http://collector:4318/v1/traces"),
            ("http://collector:4318/", "http://collector:4318/v1/traces"),
            ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
        ] {
            assert_eq!(config(typed, &Environment::default()).unwrap().endpoint, meant);
        }
    }

    #[test]
    fn grpc_is_refused_with_what_to_do() {
        for typed in ["grpc://localhost:4317", "http://localhost:4317"] {
            let fault = config(typed, &Environment::default()).unwrap_err().to_string();
            assert!(
                fault.starts_with("otlp-traces-endpoint: ") && fault.contains("4318"),
                "{fault}"
            );
        }
        for typed in ["localhost:4318", "collector", "ftp://collector", ""] {
            assert!(config(typed, &Environment::default()).is_err(), "{typed}");
        }
    }

    #[test]
    fn headers_and_names_come_from_opentelemetrys_variables() {
        let environment = Environment::from([
            ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic%20abc, x-tenant = me"),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "deployment.environment=prod,service.name=other",
            ),
            ("OTEL_SERVICE_NAME", "gem"),
        ]);
        let config = config("http://c:4318", &environment).unwrap();
        let headers: Vec<_> = config
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.expose()))
            .collect();
        assert_eq!(headers, [("Authorization", "Basic abc"), ("x-tenant", "me")]);
        let resource: Vec<_> = config
            .resource
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        assert_eq!(
            resource,
            [
                ("deployment.environment", "prod"),
                ("service.version", env!("CARGO_PKG_VERSION")),
                ("service.name", "gem")
            ]
        );
    }

    #[test]
    fn the_sampler_is_opentelemetrys() {
        let sampler = |name, argument| {
            let environment = Environment::from([("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", argument)]);
            let sampler = config("http://c:4318", &environment).ok()?.sampler;
            Some((sampler.follows_parent, sampler.share))
        };
        assert_eq!(sampler("", ""), Some((true, 1.0)));
        assert_eq!(sampler("always_off", ""), Some((false, 0.0)));
        assert_eq!(sampler("parentbased_traceidratio", "0.25"), Some((true, 0.25)));
        assert_eq!(sampler("traceidratio", ""), Some((false, 1.0)));
        assert_eq!(sampler("traceidratio", "2"), None);
        assert_eq!(sampler("jaeger_remote", ""), None);
    }

    #[test]
    fn a_header_that_cannot_be_sent_is_named_without_its_value() {
        let environment = Environment::from([("OTEL_EXPORTER_OTLP_HEADERS", "two words=secret")]);
        let fault = config("http://c:4318", &environment).unwrap_err().to_string();
        assert!(fault.contains("two words") && !fault.contains("secret"), "{fault}");
    }
}
