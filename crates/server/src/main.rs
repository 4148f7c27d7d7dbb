//! The `lapidary` binary: parses the command line and hands over to the library.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use lapidary_server::bench::{self, BenchArgs};
use lapidary_server::check;
use lapidary_server::cli::{CheckArgs, Cli, Command, LogFormat, ServeArgs};
use lapidary_server::config::{Config, Environment};
use lapidary_server::logging::{self, CauseChain};
use lapidary_server::serve;

/// The command line or a setting is at fault, as clap has it.
const USAGE_ERROR: u8 = 2;
/// Time for an exit after a failure.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => run_serve(&args),
        Command::Check(args) => run_check(&args),
        Command::Bench(args) => run_bench(&args),
    }
}

fn run_serve(args: &ServeArgs) -> ExitCode {
    let config = match Config::resolve(args, &Environment::of_process()) {
        Ok(config) => config,
        Err(error) => return fail(&error, USAGE_ERROR),
    };
    if args.print_config {
        return match config.to_toml() {
            Ok(text) => print(&text),
            Err(error) => fail(&error, USAGE_ERROR),
        };
    }
    logging::init(&config.log);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        model = config.settings.model,
        "lapidary starts"
    );
    for variable in &config.unknown_variables {
        tracing::warn!(variable, "this environment variable is no setting: is it misspelt?");
    }
    let log_format = config.log.format;
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("http")
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    let outcome = runtime.block_on(serve::serve(config));
    // Whatever still runs has nobody left to answer.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            abort_if_exit_hangs();
            let code = error.exit_code();
            if log_format == LogFormat::Json {
                tracing::error!(error = format!("{:#}", CauseChain(&error)), "failed");
                return ExitCode::from(code);
            }
            fail(&error, code)
        }
    }
}

/// The driver of a device that hangs may wait for it as the process exits.
fn abort_if_exit_hangs() {
    let spawned = std::thread::Builder::new().spawn(|| {
        std::thread::sleep(EXIT_TIMEOUT);
        std::process::abort();
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "nobody watches over the exit");
    }
}

fn run_check(args: &CheckArgs) -> ExitCode {
    let report = match check::check(args, &Environment::of_process()) {
        Ok(report) => report,
        Err(error) => return fail(&error, USAGE_ERROR),
    };
    let text = match args.json {
        false => report.to_string(),
        true => match serde_json::to_string_pretty(&report) {
            Ok(json) => json + "\n",
            Err(error) => return fail(&error, 1),
        },
    };
    match print(&text) {
        ExitCode::SUCCESS if !report.is_sound => ExitCode::FAILURE,
        code => code,
    }
}

fn run_bench(args: &BenchArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    match runtime.block_on(bench::run(args, &Environment::of_process())) {
        Err(error @ bench::BenchError::Goal(_)) => fail(&error, USAGE_ERROR),
        Err(error) => fail(&error, 1),
        Ok(report) => match print(&report.to_string()) {
            ExitCode::SUCCESS if !report.is_clean() => ExitCode::FAILURE,
            code => code,
        },
    }
}

/// Tells a person what went wrong. Nothing can be done where even stderr is closed.
fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {}", CauseChain(error));
    ExitCode::from(code)
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}
