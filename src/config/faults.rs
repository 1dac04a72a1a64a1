//! What is wrong with a setting, told with its key and where it was set.

use super::{BUILT_IN, ConfigError, Origins, invalid};

/// What keeps a text from being the address of a server. A password in it is not repeated; `without` says
/// how to do without.
pub(crate) fn address_fault(url: &str, without: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return Some(format!("must hold no password; {without}"));
    }
    // Of addresses in brackets the colons are no port's.
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !authority.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let in_brackets = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let is_host = match in_brackets {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)),
    };
    let is_port = port.is_none_or(|p| p.parse::<u16>().is_ok_and(|p| p > 0));
    let ok = ["http", "https"].contains(&scheme) && is_host && is_port && !url.contains(char::is_whitespace);
    (!ok).then(|| format!("{url:?} is no http or https address, such as http://localhost:8000/v1"))
}

/// A table that is no configuration; the error's text ends with the key, which tells where it was set.
pub(super) fn unread(origins: &Origins, error: &toml::de::Error) -> ConfigError {
    let text = error.to_string();
    let key = text.trim_end().lines().last().and_then(|l| l.strip_prefix("in `")?.strip_suffix('`'));
    let message = error.message().replace('\n', ", ");
    match key {
        Some(key) => {
            let origin = origins.get(key).map_or(BUILT_IN, String::as_str);
            invalid(origin, &format!("`{key}`: {message}"))
        }
        None => invalid("configuration", &message),
    }
}

/// An error of a key with the file that set it; `--set` names the key itself.
pub(super) fn located(error: ConfigError, origins: &Origins) -> ConfigError {
    match error {
        ConfigError::Invalid { origin: key, message } => match origins.get(&key) {
            Some(file) if !file.starts_with("--") => invalid(&format!("{file}: {key}"), &message),
            _ => invalid(&key, &message),
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    fn set(s: &str) -> Result<Config, super::ConfigError> {
        Config::resolve(None, &[s.to_string()])
    }

    #[test]
    fn what_cannot_be_names_its_key_its_place_and_what_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::resolve(Some(&path), &[]).unwrap_err().to_string()
        };
        let file = path.display();
        let e = of("[depth]\nsample = \"mid\"\n");
        assert_eq!(
            e,
            format!("{file}: `depth.sample`: unknown variant `mid`, expected `center` or `median`")
        );
        assert_eq!(of("[planner]\ntop_p = 7.0\n"), format!("{file}: planner.top_p: 7 is outside 0…1"));
        let e = set("grounding.mining.granularity=all").unwrap_err().to_string();
        assert!(
            e.starts_with("--set grounding.mining.granularity=all: `grounding.mining.granularity`: "),
            "{e}"
        );
        assert!(e.ends_with("expected one of `box`, `pass`, `none`"), "{e}");
        for part in ["planner", "detector", "depth", "vlm", "verifier"] {
            let e = set(&format!("{part}.model=")).unwrap_err().to_string();
            assert!(e.starts_with(&format!("{part}.model: is empty; name embedded, ")), "{e}");
        }
    }

    #[test]
    fn addresses_of_servers_are_looked_at_before_they_are_asked() {
        let servers = |url: &str| {
            let sets =
                ["urls=['http://a/v1', '".to_owned() + url + "']", "model=m".into(), "folder=/x".into()];
            Config::resolve(None, &sets.map(|s| format!("reasoner.servers.{s}")))
        };
        let urls =
            ["http://gpu1:8000/v1", "https://api.openai.com/v1", "http://[::1]:80/v1", "http://127.0.0.1:9"];
        for url in urls {
            servers(url).unwrap();
            set(&format!("endpoints.x.base_url={url}")).unwrap();
        }
        for url in
            ["gpu1:8000/v1", "ftp://a/v1", "http://", "http:///v1", "http://a:port/v1", "http://a b/v1"]
        {
            let e = servers(url).unwrap_err().to_string();
            assert!(
                e.starts_with("reasoner.servers.urls: ") && e.contains("no http or https address"),
                "{e}"
            );
            let e = set(&format!("endpoints.x.base_url={url}")).unwrap_err().to_string();
            assert!(e.starts_with("endpoints.x.base_url: ") && e.contains(url), "{e}");
        }
        let e = servers("https://me:secret@a/v1").unwrap_err().to_string();
        assert!(e.contains("must hold no password") && !e.contains("secret"), "{e}");
        // One that is asked needs one.
        let sets = ["endpoints.x.model=m", "vlm.model=endpoint:x"].map(str::to_owned);
        let e = Config::resolve(None, &sets).unwrap_err().to_string();
        assert!(e.starts_with("endpoints.x.base_url: is empty, and vlm.model names this endpoint"), "{e}");
    }
}
