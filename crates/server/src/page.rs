//! The page at `/`: tries the server from a browser. One file without anything from elsewhere, embedded.

use std::sync::LazyLock;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use ring::digest::{SHA256, digest};

const HTML: &str = include_str!("page/index.html");

/// Where it is.
pub(crate) const PATH: &str = "/";

/// The page's own script and style and nothing else, requests to this server and to no other, no frames around it; and
/// nowhere can text become HTML.
static CONTENT_SECURITY_POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        source_of("script"),
        source_of("style")
    );
    HeaderValue::from_str(&policy).expect("hashes are ASCII")
});

/// `GET /`.
pub(crate) async fn page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY.clone()),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            HeaderValue::from_static("same-origin"),
        ),
        // It belongs to this build.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, Html(HTML)).into_response()
}

/// What the page's only element of this name holds, as a source of the policy.
fn source_of(element: &str) -> String {
    let (start, end) = (format!("<{element}>"), format!("</{element}>"));
    let content = HTML.split_once(&start).and_then(|(_, rest)| rest.split_once(&end));
    let (content, _) = content.expect("the page has the element");
    format!("sha256-{}", base64(digest(&SHA256, content.as_bytes()).as_ref()))
}

/// With padding, as hashes in policies are written.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for index in 0..4 {
            match index <= chunk.len() {
                true => text.push(char::from(ALPHABET[(bits >> (18 - 6 * index) & 63) as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_padded() {
        let encoded = ["", "f", "fo", "foo", "foob", "\u{fb}"].map(|text| base64(text.as_bytes()));
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "w7s="]);
    }

    #[test]
    fn the_page_has_nothing_that_its_policy_forbids_and_is_small() {
        assert_eq!(HTML.matches("<script").count(), 1);
        assert_eq!(HTML.matches("<style").count(), 1);
        for forbidden in [
            "style=",
            " onclick",
            "innerHTML",
            "insertAdjacentHTML",
            "src=",
            "@import",
            "url(",
        ] {
            assert!(!HTML.contains(forbidden), "{forbidden}");
        }
        assert!(HTML.len() < 40 << 10, "{} bytes", HTML.len());
    }
}
