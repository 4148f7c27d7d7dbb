//! Keys and certificates.

use std::io::{Read, Write};
use std::sync::Arc;

use rcgen::{CertifiedKey, KeyPair};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::{Folder, Server, finish, lapidary, poll, read_response};

/// Status of a GET with a key.
fn get_with_key(server: &Server, path: &str, key: &str) -> u16 {
    let mut stream = server.connect();
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}");
    write!(stream, "{head}\r\n\r\n").unwrap();
    read_response(stream).0
}

#[test]
fn keys_come_from_flags_the_environment_and_a_file_that_may_change() {
    let folder = Folder::new("keys");
    let file = folder.0.join("keys");
    std::fs::write(&file, "sk-file\n").unwrap();
    let mut command = lapidary(&["serve", "demo", "--api-key-file", file.to_str().unwrap()]);
    command
        .env("VLLM_API_KEY", "sk-vllm")
        .env("LAPIDARY_LOG_LEVEL", "debug");
    let server = Server::start_with(command);
    server.log_line("\"ready\"");
    let statuses = |keys: [&str; 4]| keys.map(|key| get_with_key(&server, "/v1/models", key));
    let keys = ["sk-file", "sk-vllm", "sk-new", ""];
    assert_eq!(statuses(keys), [200, 200, 401, 401]);
    assert_eq!(server.get("/live").0, 200);
    // Nothing has changed: only the signal has it read.
    server.signal("HUP");
    server.log_line("\"read again\"");
    // Without a signal, too. Not by the log: a file may be read when half of it is written, and then once more.
    let wait_for = |expected: [u16; 4]| poll("other keys", || (statuses(keys) == expected).then_some(()));
    std::fs::write(&file, "# rotated\nsk-new\n").unwrap();
    wait_for([401, 200, 200, 401]);
    std::fs::write(&file, "sk-file\nsk-and-another\n").unwrap();
    wait_for([200, 200, 401, 401]);
    std::fs::remove_file(&file).unwrap();
    let line = server.log_line("cannot be read again");
    assert_eq!(statuses(keys), [200, 200, 401, 401], "{line}");
    server.signal("TERM");
    let log: String = server.log.iter().collect();
    assert!(!log.contains("sk-"), "a key is in the log: {log}");
}

#[test]
fn print_config_shows_no_key() {
    let flags = ["--api-key", "sk-one", "--api-key", "sk-two"];
    let (code, said) = finish(&[&["serve", "--print-config"][..], &flags].concat());
    assert_eq!(code, 0);
    assert!(
        said.contains("# api-key: not shown\n") && !said.contains("sk-"),
        "{said}"
    );
}

/// Writes a certificate for `localhost` and its key, and gives the certificate.
fn write_certificate(folder: &Folder) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(folder.0.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(folder.0.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

/// Status of a GET of /ready over TLS by a client that trusts one certificate, and may show one of its own.
fn get_over_tls(
    server: &Server,
    trusted: &CertificateDer<'static>,
    own: Option<&CertifiedKey<KeyPair>>,
) -> Result<u16, std::io::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        None => config.with_no_client_auth(),
        Some(CertifiedKey { cert, signing_key }) => {
            let key = PrivateKeyDer::from_pem_slice(signing_key.serialize_pem().as_bytes()).unwrap();
            config.with_client_auth_cert(vec![cert.der().clone()], key).unwrap()
        }
    };
    let client = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(client, server.connect());
    stream.write_all(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut status = [0; 12];
    stream.read_exact(&mut status)?;
    Ok(std::str::from_utf8(&status[9..]).unwrap().parse().unwrap())
}

#[test]
fn https_is_served_with_a_certificate_that_may_change() {
    let folder = Folder::new("tls");
    let old = write_certificate(&folder);
    let file = |name: &str| folder.0.join(name).to_str().unwrap().to_owned();
    let (cert, key) = (file("cert.pem"), file("key.pem"));
    let server = Server::ready(&["serve", "demo", "--ssl-certfile", &cert, "--ssl-keyfile", &key]);
    assert_eq!(get_over_tls(&server, &old, None).unwrap(), 200);
    // A client that speaks HTTP gets no answer, and disturbs nobody.
    let mut rest = Vec::new();
    let mut plain = server.connect();
    // It may be closed before all is written.
    let _ = plain.write_all(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n");
    let _ = plain.read_to_end(&mut rest);
    assert!(!rest.starts_with(b"HTTP"));
    let new = write_certificate(&folder);
    server.signal("HUP");
    // By what is served: the files may have been read before the signal, too, and between the two writes.
    poll("the new certificate", || {
        (get_over_tls(&server, &new, None).ok()? == 200).then_some(())
    });
    assert!(
        get_over_tls(&server, &old, None).is_err(),
        "the old certificate is still in use"
    );
    std::fs::write(&cert, "no certificate").unwrap();
    server.signal("HUP");
    server.log_line("cannot be read again");
    assert_eq!(get_over_tls(&server, &new, None).unwrap(), 200);
}

#[test]
fn clients_show_certificates_where_a_ca_is_named() {
    let folder = Folder::new("mtls");
    let trusted = write_certificate(&folder);
    let file = |name: &str| folder.0.join(name).to_str().unwrap().to_owned();
    let (cert, key, ca) = (file("cert.pem"), file("key.pem"), file("ca.pem"));
    let client = || rcgen::generate_simple_self_signed(vec!["client".to_owned()]).unwrap();
    let (known, stranger) = (client(), client());
    std::fs::write(&ca, known.cert.pem()).unwrap();
    let files = ["--ssl-certfile", &cert, "--ssl-keyfile", &key, "--ssl-ca-certs", &ca];
    let server = Server::ready(&[&["serve", "demo"][..], &files].concat());
    assert_eq!(get_over_tls(&server, &trusted, Some(&known)).unwrap(), 200);
    assert!(get_over_tls(&server, &trusted, Some(&stranger)).is_err());
    assert!(get_over_tls(&server, &trusted, None).is_err());
    std::fs::write(&ca, stranger.cert.pem()).unwrap();
    server.signal("HUP");
    poll("the new CA", || {
        (get_over_tls(&server, &trusted, Some(&stranger)).ok()? == 200).then_some(())
    });
    assert!(get_over_tls(&server, &trusted, Some(&known)).is_err());
}

#[test]
fn a_certificate_without_its_key_is_a_usage_error() {
    let (code, said) = finish(&["serve", "--ssl-certfile", "/etc/hostname"]);
    assert_eq!(
        (code, said.as_str()),
        (2, "error: ssl-keyfile: is needed with ssl-certfile\n")
    );
    let files = ["--ssl-certfile", "/etc/hostname", "--ssl-keyfile", "/etc/hostname"];
    let (code, said) = finish(&[&["serve", "--port", "0", "--log-level", "error"][..], &files].concat());
    assert_eq!(code, 1);
    assert!(
        said.contains("cannot serve HTTPS") && said.contains("/etc/hostname"),
        "{said}"
    );
}
