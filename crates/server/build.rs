//! Names the commit that is built, for `lapidary_build_info`: `BUILD_COMMIT` where it is set; else, in release builds out
//! of a clone, git's.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=BUILD_COMMIT");
    let is_given = env::var("BUILD_COMMIT").is_ok_and(|commit| !commit.is_empty());
    // Others are for whoever changes something: a commit need not build them anew.
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if !is_given
        && is_release
        && let Some(commit) = commit_of_clone()
    {
        println!("cargo::rustc-env=BUILD_COMMIT={commit}");
    }
}

fn commit_of_clone() -> Option<String> {
    // A copy of the sources may lie in a repository of something else.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    // Git writes there with each commit and checkout, and at no other time. Without the file cargo would always run this.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    let log = if Path::new(&log).exists() {
        log
    } else {
        git(&["rev-parse", "--git-path", "HEAD"])?
    };
    println!("cargo::rerun-if-changed={log}");
    git(&["rev-parse", "HEAD"])
}

/// What git answers in this crate's folder, if it does.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let answer = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| answer.trim().to_owned())
}
