//! HTTPS: certificate, key and what clients' certificates are held to, from files which may be replaced while the server
//! runs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;

use crate::config::{ClientCertificates, TlsConfig};

/// Why HTTPS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds nothing of its kind.
    #[error("cannot use {}", path.display())]
    File {
        /// Certificate or key.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// Certificate and key do not belong together, or are of no kind that is known.
    #[error("cannot use certificate and key")]
    Pair(#[source] rustls::Error),
    /// A certificate that clients' should come from is of no use for it.
    #[error("cannot use a certificate of {}", path.display())]
    Ca {
        /// Of `--ssl-ca-certs`.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// There is no certificate that clients' could come from.
    #[error("cannot ask clients for certificates")]
    Clients(#[source] VerifierBuilderError),
}

/// What connections are encrypted with at present.
#[derive(Debug)]
pub(super) struct Tls {
    files: TlsConfig,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    pub(super) fn open(files: &TlsConfig) -> Result<Self, TlsError> {
        Ok(Self {
            files: files.clone(),
            current: RwLock::new(read(files)?),
        })
    }

    pub(super) fn files(&self) -> Vec<&Path> {
        let TlsConfig {
            certfile,
            keyfile,
            clients,
        } = &self.files;
        let ca_certs = clients.as_ref().map(|clients| &clients.ca_certs);
        [certfile, keyfile]
            .into_iter()
            .chain(ca_certs)
            .map(PathBuf::as_path)
            .collect()
    }

    /// Reads the files again, for connections to come; on an error all stays as it is.
    pub(super) fn reload(&self) -> Result<(), TlsError> {
        let config = read(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// The handshake.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<TlsStream<S>> {
        let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
        tokio_rustls::TlsAcceptor::from(config).accept(stream).await
    }
}

fn read(files: &TlsConfig) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(&files.certfile)?;
    let key = PrivateKeyDer::from_pem_file(&files.keyfile).map_err(|source| TlsError::File {
        path: files.keyfile.clone(),
        source,
    })?;
    let verifier = match &files.clients {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(clients) => verifier(clients)?,
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::Pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|source| TlsError::File {
            path: path.to_owned(),
            source,
        })
}

/// Judges the certificates that clients show.
fn verifier(clients: &ClientCertificates) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&clients.ca_certs)? {
        roots.add(certificate).map_err(|source| TlsError::Ca {
            path: clients.ca_certs.clone(),
            source,
        })?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()));
    let builder = match clients.is_required {
        true => builder,
        false => builder.allow_unauthenticated(),
    };
    builder.build().map_err(TlsError::Clients)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::ClientConfig;

    use super::*;

    type Ca = CertifiedIssuer<'static, KeyPair>;

    fn ca() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    /// A certificate for `localhost`, and its key.
    fn issue(ca: &Ca) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.signed_by(&key, ca).unwrap().pem(), key)
    }

    struct Rig {
        folder: PathBuf,
        server_ca: Ca,
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            // What stays is the system's to clean up.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    impl Rig {
        fn new() -> Self {
            let name = format!("lapidary-tls-{:016x}", crate::request_id::random_u64());
            let (folder, server_ca) = (std::env::temp_dir().join(name), ca());
            fs::create_dir(&folder).unwrap();
            let (certificate, key) = issue(&server_ca);
            fs::write(folder.join("cert.pem"), certificate).unwrap();
            fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
            Self { folder, server_ca }
        }

        fn trust(&self, cas: &[&Ca]) {
            let text: String = cas.iter().map(|ca| ca.pem()).collect();
            fs::write(self.folder.join("ca.pem"), text).unwrap();
        }

        fn open(&self, is_required: bool) -> Result<Tls, TlsError> {
            let file = |name| self.folder.join(name);
            Tls::open(&TlsConfig {
                certfile: file("cert.pem"),
                keyfile: file("key.pem"),
                clients: Some(ClientCertificates {
                    ca_certs: file("ca.pem"),
                    is_required,
                }),
            })
        }

        /// Whether a client with a certificate of `ca`, or without one, gets through to an answer.
        async fn is_let_in(&self, tls: &Tls, ca: Option<&Ca>) -> bool {
            let mut roots = RootCertStore::empty();
            roots.add(self.server_ca.der().clone()).unwrap();
            let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots);
            let config = match ca.map(issue) {
                None => config.with_no_client_auth(),
                Some((certificate, key)) => {
                    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
                    let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
                    config.with_client_auth_cert(chain, key).unwrap()
                }
            };
            let (near, far) = tokio::io::duplex(1 << 16);
            let client = async {
                let connector = TlsConnector::from(Arc::new(config));
                let mut stream = connector.connect("localhost".try_into().unwrap(), near).await?;
                // With TLS 1.3 the client learns only now what became of its certificate.
                let mut answer = [0; 2];
                stream.read_exact(&mut answer).await.map(|_| answer)
            };
            let server = async {
                let mut stream = tls.accept(far).await?;
                stream.write_all(b"ok").await?;
                stream.flush().await
            };
            let (answer, served) = tokio::join!(client, server);
            assert_eq!(answer.is_ok(), served.is_ok(), "{answer:?} {served:?}");
            answer.is_ok()
        }
    }

    #[tokio::test]
    async fn only_certificates_of_the_ca_are_let_in() {
        let (rig, [right, wrong, second]) = (Rig::new(), [ca(), ca(), ca()]);
        rig.trust(&[&right, &second]);
        for is_required in [true, false] {
            let tls = rig.open(is_required).unwrap();
            assert!(rig.is_let_in(&tls, Some(&right)).await);
            assert!(rig.is_let_in(&tls, Some(&second)).await);
            assert!(!rig.is_let_in(&tls, Some(&wrong)).await, "even where none is needed");
            assert_eq!(rig.is_let_in(&tls, None).await, !is_required);
        }
    }

    #[tokio::test]
    async fn a_ca_that_is_replaced_counts_for_new_connections() {
        let (rig, [old, new]) = (Rig::new(), [ca(), ca()]);
        rig.trust(&[&old]);
        let tls = rig.open(true).unwrap();
        assert!(tls.files().contains(&rig.folder.join("ca.pem").as_path()));
        rig.trust(&[&new]);
        assert!(rig.is_let_in(&tls, Some(&old)).await);
        tls.reload().unwrap();
        assert!(rig.is_let_in(&tls, Some(&new)).await && !rig.is_let_in(&tls, Some(&old)).await);
        rig.trust(&[]);
        assert!(matches!(tls.reload(), Err(TlsError::Clients(_))));
        assert!(
            rig.is_let_in(&tls, Some(&new)).await,
            "what was read before stays in use"
        );
    }
}
