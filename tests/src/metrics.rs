//! Reads Prometheus text.

/// Sum of all samples of `name` whose labels contain every `key="value"` of `labels`.
///
/// # Panics
/// When no sample matches: a renamed metric must not read as 0.
#[must_use]
pub fn sum(exposition: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let samples: Vec<f64> = exposition
        .lines()
        .filter_map(|line| sample(line, name, labels))
        .collect();
    assert!(!samples.is_empty(), "no sample of {name} {labels:?}");
    samples.iter().sum()
}

fn sample(line: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let (found, value) = match rest.strip_prefix('{') {
        Some(rest) => rest.rsplit_once("} ")?,
        None => ("", rest.strip_prefix(' ')?),
    };
    let matches = labels
        .iter()
        .all(|(key, value)| found.contains(&format!("{key}=\"{value}\"")));
    if matches { value.parse().ok() } else { None }
}
