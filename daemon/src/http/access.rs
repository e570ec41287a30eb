//! Who may ask: the API key, and no web page.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::{App, Problem};

/// Asks for `Authorization: Bearer KEY` when a key is configured.
pub async fn key(State(app): State<App>, request: Request, next: Next) -> Response {
    if let Some(key) = &app.config.api_key
        && !bearer(request.headers()).is_some_and(|given| same(given, key))
    {
        let detail = match bearer(request.headers()) {
            Some(_) => "the API key is wrong: it is not http.api_key of this daemon",
            None => "no API key was sent: send it as `Authorization: Bearer KEY`",
        };
        return Problem::new(401, "unauthorized", detail).header(header::WWW_AUTHENTICATE, "Bearer").into_response();
    }
    next.run(request).await
}

/// On loopback, refuses what a web page in the operator's browser could send: a foreign `Host` is DNS rebinding, a
/// foreign `Origin` is a cross-site request.
pub async fn same_machine(State(app): State<App>, request: Request, next: Next) -> Response {
    if app.config.listen.ip().is_loopback() {
        let headers = request.headers();
        let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or_default());
        if host.is_some_and(|host| !is_loopback(host)) {
            let detail = "the Host is not this machine: apollod listens on loopback only";
            return Problem::new(403, "host", detail).into_response();
        }
        let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
        let local = |origin: &str| origin.split_once("://").is_some_and(|(_, host)| is_loopback(host));
        if origin.is_some_and(|origin| !local(origin)) {
            return Problem::new(403, "origin", "requests of web pages are not taken").into_response();
        }
    }
    next.run(request).await
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Compares digests, whose equality takes the same time wherever they differ.
fn same(given: &str, key: &str) -> bool {
    blake3::hash(given.as_bytes()) == blake3::hash(key.as_bytes())
}

/// Whether `host`, with or without port, names this machine.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, port)) if port.is_empty() || port.starts_with(':') => name,
        Some(_) => return false,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_loopback() {
        for host in ["localhost", "LOCALHOST:8844", "127.0.0.1", "127.0.0.1:8844", "[::1]", "[::1]:8844", "127.1.2.3"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "example.com", "example.com:8844", "127.0.0.1.example.com", "10.0.0.1", "[::1]x", "[::2]:1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn the_key_is_read_from_the_bearer_scheme_only() {
        let headers = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(bearer(&headers("Bearer abc")), Some("abc"));
        assert_eq!(bearer(&headers("bearer  abc")), Some("abc"));
        assert_eq!(bearer(&headers("Basic abc")), None);
        assert_eq!(bearer(&HeaderMap::new()), None);
        assert!(same("abc", "abc") && !same("abc", "abd") && !same("", "abc"));
    }
}
