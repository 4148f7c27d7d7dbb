//! A real server process and what the operating system says of it.

use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::http::Connection;

const READY_WITHIN: Duration = Duration::from_secs(120);

/// Builds the `lapidary` binary in the profile of the caller (a test in `dev`, a bench in `release`) and says where it is.
///
/// # Errors
/// Cargo failed.
pub fn lapidary_binary() -> io::Result<PathBuf> {
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "build",
        "--package",
        "lapidary-server",
        "--bin",
        "lapidary",
        "--message-format",
        "json",
    ]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command.stderr(Stdio::inherit()).output()?;
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)));
    executable.ok_or_else(|| io::Error::other("cargo built no lapidary binary"))
}

/// Killed when dropped.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl ServerProcess {
    /// Starts `lapidary serve demo` with more arguments.
    ///
    /// # Errors
    /// It could not be built, or ended, or was not ready in time.
    pub async fn demo(arguments: &[&str]) -> io::Result<Self> {
        let mut all = vec!["serve", "demo", "--port", "0"];
        all.extend(arguments);
        Self::start(&lapidary_binary()?.to_string_lossy(), &all).await
    }

    /// Starts `binary` (which must print `http://ADDRESS` on stderr) and waits until `/ready` is 200.
    ///
    /// # Errors
    /// It ended, or was not ready in time.
    pub async fn start(binary: &str, arguments: &[&str]) -> io::Result<Self> {
        let mut child = Command::new(binary)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut lines = BufReader::new(stderr).lines();
        let address = loop {
            let Some(line) = lines.next() else {
                return Err(io::Error::other("the server ended before it listened"));
            };
            if let Some(address) = address_in(&line?) {
                break address;
            }
        };
        // Keeps the pipe empty, so that the server never blocks on its log.
        std::thread::spawn(move || lines.for_each(drop));
        let server = Self { child, address };
        server.wait_until_ready().await?;
        Ok(server)
    }

    async fn wait_until_ready(&self) -> io::Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while Instant::now() < deadline {
            let response = Connection::open(self.address)
                .await?
                .request("GET", "/ready", "")
                .await?;
            if response.head.status == 200 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// The text of `/metrics`.
    ///
    /// # Errors
    /// As the socket's.
    pub async fn metrics(&self) -> io::Result<String> {
        Ok(Connection::open(self.address)
            .await?
            .request("GET", "/metrics", "")
            .await?
            .body)
    }

    /// Resident memory, bytes.
    ///
    /// # Errors
    /// The process is gone.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        kib.map(|kib: u64| kib * 1024)
            .ok_or_else(|| io::Error::other("no VmRSS"))
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// As `kill`'s.
    pub fn terminate(&self) -> io::Result<()> {
        let status = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other("kill failed"))
        }
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// As `wait`'s.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Already gone is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let rest = &line[line.find("http://")? + "http://".len()..];
    let end = rest
        .find(|c: char| !(c.is_ascii_digit() || ".:[]".contains(c)))
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}
