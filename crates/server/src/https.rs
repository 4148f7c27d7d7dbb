//! Whom this process trusts where it is the client: the built-in authorities, or those of a file.

use std::io;
use std::path::Path;

use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

/// TLS for a client that trusts the authorities in a PEM file in place of the built-in ones.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn trusting(ca_bundle: Option<&Path>) -> io::Result<TlsConfig> {
    let tls = TlsConfig::builder();
    let Some(path) = ca_bundle else {
        return Ok(tls.build());
    };
    let pem = std::fs::read(path)?;
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let roots = RootCerts::new_with_certs(&certificates.collect::<Vec<_>>());
    Ok(tls.root_certs(roots).build())
}
