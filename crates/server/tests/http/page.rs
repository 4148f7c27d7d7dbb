//! The page at `/`; what it does in a browser is tested in one (tests/clients).

use lapidary_server::access::{Access, ApiKeys, KeyLimits};
use lapidary_server::config::Token;

use crate::support::{Server, Setup};

fn server(access: Access) -> Server {
    Setup {
        access,
        ..Setup::default()
    }
    .start()
}

#[tokio::test]
async fn it_is_served_with_a_policy_that_forbids_everything_else() {
    let server = server(Access {
        has_page: true,
        ..Access::default()
    });
    let page = server.get("/").await;
    assert_eq!(page.status, 200);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
    let policy = page.header("content-security-policy").unwrap();
    let directives: Vec<&str> = policy.split("; ").collect();
    assert_eq!(directives[0], "default-src 'none'");
    for kind in ["script-src", "style-src"] {
        let sources = directives
            .iter()
            .find_map(|directive| directive.strip_prefix(kind))
            .unwrap();
        assert!(
            sources.starts_with(" 'sha256-") && !sources[1..].contains(' '),
            "{sources}"
        );
    }
    for directive in [
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(directives.contains(&directive), "{directive} in {policy}");
    }
    assert_eq!(server.post("/", "").await.status, 405);
}

#[tokio::test]
async fn it_is_open_where_all_else_needs_a_key() {
    let keys = ApiKeys::new(vec![Token::new("sk-right")], None, KeyLimits::default());
    let server = server(Access {
        keys: Some(keys.unwrap()),
        has_page: true,
        root_path: "/gem".to_owned(),
        ..Access::default()
    });
    for path in ["/", "/gem", "/gem/"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    for path in ["/v1/models", "/metrics", "/gem/metrics", "/index.html", "//"] {
        assert_eq!(server.get(path).await.status, 401, "{path}");
    }
}

#[tokio::test]
async fn without_it_there_is_nothing() {
    let page = server(Access::default()).get("/").await;
    assert_eq!(page.status, 404);
    assert_eq!(page.json()["error"]["code"], "unknown_url");
}
