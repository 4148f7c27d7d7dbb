//! W3C Trace Context: who caused a request.

use axum::http::HeaderMap;

use crate::config::Sampler;
use crate::request_id::random_u64;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Bytes of a `tracestate` that are passed on: what the specification asks for at least.
const MAX_STATE_BYTES: usize = 512;

/// Bit of the flags: whoever began the trace records it.
const SAMPLED: u8 = 1;

/// The place of a span in its trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TraceContext {
    pub(crate) trace_id: u128,
    pub(crate) span_id: u64,
    /// The caller's span; `None` at the root of a trace.
    pub(crate) parent_id: Option<u64>,
    /// The caller's `tracestate`, empty if it has none.
    pub(crate) state: String,
}

impl TraceContext {
    /// Of a new span within the trace that the headers name, or within a new one. `None`: it is not to be recorded.
    pub(crate) fn of_request(headers: &HeaderMap, sampler: Sampler) -> Option<Self> {
        let parent = parent(headers);
        let trace_id = match &parent {
            Some(parent) => parent.trace_id,
            None => (u128::from(random_u64()) << 64 | u128::from(random_u64())).max(1),
        };
        let is_sampled = match &parent {
            Some(parent) if sampler.follows_parent => parent.flags & SAMPLED != 0,
            _ => is_in_share(trace_id, sampler.share),
        };
        is_sampled.then(|| Self {
            trace_id,
            span_id: random_u64().max(1),
            parent_id: parent.as_ref().map(|parent| parent.span_id),
            state: parent.map(|_| state(headers)).unwrap_or_default(),
        })
    }

    /// As logs and traces write it.
    pub(crate) fn trace_id_hex(&self) -> String {
        format!("{:032x}", self.trace_id)
    }
}

struct Parent {
    trace_id: u128,
    span_id: u64,
    flags: u8,
}

/// By the lower half of the id, which is random in every version of the specification.
#[expect(clippy::cast_precision_loss, reason = "a share needs no more than 53 bits")]
fn is_in_share(trace_id: u128, share: f64) -> bool {
    let low = trace_id as u64;
    (low >> 1) as f64 <= share * (1_u64 << 63) as f64 && share > 0.0
}

/// What `traceparent` says, if it is valid: there is one, of a version whose beginning is known.
fn parent(headers: &HeaderMap) -> Option<Parent> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let mut fields = value.to_str().ok()?.split('-');
    let version = hex(fields.next()?, 2)?;
    let trace_id = hex(fields.next()?, 32)?;
    let span_id = u64::try_from(hex(fields.next()?, 16)?).ok()?;
    let flags = u8::try_from(hex(fields.next()?, 2)?).ok()?;
    // Later versions may add fields.
    let is_known = version != 0xff && (version > 0 || fields.next().is_none());
    (is_known && trace_id != 0 && span_id != 0).then_some(Parent {
        trace_id,
        span_id,
        flags,
    })
}

/// So many lower-case digits.
fn hex(field: &str, num_digits: usize) -> Option<u128> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (field.len() == num_digits && field.bytes().all(is_digit))
        .then(|| u128::from_str_radix(field, 16).ok())
        .flatten()
}

/// All `tracestate` headers as one. One that is too long is left out, as a whole: half an entry is none.
fn state(headers: &HeaderMap) -> String {
    let values: Vec<&str> = headers
        .get_all(TRACESTATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    let state = values.join(",");
    if state.len() <= MAX_STATE_BYTES {
        state
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn context(values: &[&str]) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, value.parse().unwrap());
        }
        headers.append(TRACESTATE, "a=1".parse().unwrap());
        headers.append(TRACESTATE, "b=2".parse().unwrap());
        TraceContext::of_request(&headers, Sampler::default())
    }

    #[test]
    fn a_trace_is_continued() {
        for parent in [PARENT, "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-more"] {
            let context = context(&[parent]).unwrap();
            assert_eq!(context.trace_id_hex(), "4bf92f3577b34da6a3ce929d0e0e4736");
            assert_eq!(context.parent_id, Some(0x00f0_67aa_0ba9_02b7));
            assert_eq!(context.state, "a=1,b=2");
            assert_ne!(context.span_id, 0);
        }
    }

    #[test]
    fn a_trace_that_is_not_recorded_stays_so() {
        assert_eq!(
            context(&["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"]),
            None
        );
    }

    #[test]
    fn what_is_no_parent_begins_a_trace() {
        for invalid in [
            &[][..],
            &[PARENT, PARENT],
            &[""],
            &["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"],
            &["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more"],
            &["ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
            &["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"],
            &["00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
            &["00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"],
        ] {
            let context = context(invalid).unwrap();
            assert_eq!(context.parent_id, None, "{invalid:?}");
            assert_ne!(context.trace_id, 0);
            assert_eq!(context.state, "");
        }
        assert_ne!(context(&[]).unwrap().trace_id, context(&[]).unwrap().trace_id);
    }

    #[test]
    fn a_share_of_traces_is_chosen_by_their_ids() {
        let sampler = |follows_parent, share| Sampler { follows_parent, share };
        let is_sampled = |value: &str, sampler| {
            let headers = HeaderMap::from_iter([(HeaderName::from_static(TRACEPARENT), value.parse().unwrap())]);
            TraceContext::of_request(&headers, sampler).is_some()
        };
        let low = "00-4bf92f3577b34da60000000000000001-00f067aa0ba902b7-00";
        let high = "00-4bf92f3577b34da6ffffffffffffffff-00f067aa0ba902b7-01";
        assert!(is_sampled(low, sampler(false, 0.5)) && !is_sampled(high, sampler(false, 0.5)));
        assert!(!is_sampled(low, sampler(true, 0.5)) && is_sampled(high, sampler(true, 0.5)));
        assert!(is_sampled(high, sampler(false, 1.0)) && !is_sampled(low, sampler(false, 0.0)));
        let of_roots = |share| {
            let trace = || TraceContext::of_request(&HeaderMap::new(), sampler(true, share));
            (0..1000).filter(|_| trace().is_some()).count()
        };
        assert_eq!((of_roots(0.0), of_roots(1.0)), (0, 1000));
        assert!((100..400).contains(&of_roots(0.25)), "{}", of_roots(0.25));
    }
}
