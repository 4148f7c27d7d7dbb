//! How much memory this process may use: the machine's, or its control group's if that is less.

use lapidary_model::MemoryInfo;

/// What can be allocated now, and what there is in all.
pub(crate) fn available() -> MemoryInfo {
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| parse_meminfo(&text));
    // Not Linux: nothing is known, so nothing is refused.
    let machine = machine.unwrap_or(MemoryInfo {
        free_bytes: u64::MAX / 2,
        total_bytes: u64::MAX / 2,
    });
    let Some((limit, used)) = control_group() else {
        return machine;
    };
    MemoryInfo {
        free_bytes: machine.free_bytes.min(limit.saturating_sub(used)),
        total_bytes: machine.total_bytes.min(limit),
    }
}

fn parse_meminfo(text: &str) -> Option<MemoryInfo> {
    let field = |name: &str| {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
            .map(|kib| kib * 1024)
    };
    Some(MemoryInfo {
        free_bytes: field("MemAvailable")?,
        total_bytes: field("MemTotal")?,
    })
}

/// Limit and use in bytes, where there is a limit (cgroup v2, as containers see it). File cache counts as use although
/// the kernel would give it up, so inactive file pages are taken off.
fn control_group() -> Option<(u64, u64)> {
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let limit = read("memory.max")?.trim().parse::<u64>().ok()?;
    let used = read("memory.current")?.trim().parse::<u64>().ok()?;
    let stat = read("memory.stat")?;
    let inactive = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some((limit, used.saturating_sub(inactive.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemFree:         10 kB\nMemAvailable:    50 kB\n";
        assert_eq!(
            parse_meminfo(text),
            Some(MemoryInfo {
                free_bytes: 51_200,
                total_bytes: 102_400
            })
        );
        assert_eq!(parse_meminfo("MemTotal: 1 kB"), None);
    }
}
