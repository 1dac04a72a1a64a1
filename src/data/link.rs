//! Pictures behind links, fetched once and kept.
//!
//! A link is a stranger's: only http and https are followed, few redirects, within limits on time and
//! size, and nothing of this machine (no token, no cookie) goes along. What comes is a picture only when
//! it has been decoded. A link that is dead is one picture less, not the end. Hosts are not restricted:
//! whoever does not trust a bench's links fetches its pictures beforehand, and sets `HF_HUB_OFFLINE=1`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::LARGEST_PICTURE;
use crate::files::{sha256_hex, write_atomic};
use crate::weights::hub::is_offline;

const TRIES: u32 = 3;

/// What keeps a picture from being here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{link}: {message}")]
pub struct LinkError {
    pub link: String,
    pub message: String,
    pub cause: LinkCause,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkCause {
    /// The link's, or of what lies behind it.
    Link,
    /// The network's: no other link may work either.
    Network,
    /// This machine's: what was fetched cannot be kept.
    Here,
}

/// A folder of pictures by the hashes of their links.
pub struct Links {
    folder: PathBuf,
    offline: bool,
    agent: ureq::Agent,
}

impl Links {
    pub fn new(folder: PathBuf) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(3)
            .timeout_global(Some(Duration::from_secs(60)))
            .timeout_connect(Some(Duration::from_secs(20)))
            .user_agent(concat!("valor/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self { folder, offline: is_offline(), agent }
    }

    /// The file behind a link, from the folder or fetched into it.
    pub fn get(&self, link: &str) -> Result<Vec<u8>, LinkError> {
        let of = |cause, message| LinkError { link: link.to_owned(), message, cause };
        let fail = |message: String| of(LinkCause::Link, message);
        if !link.starts_with("http://") && !link.starts_with("https://") {
            return Err(fail("is no http or https address".into()));
        }
        let name: String = sha256_hex(link.as_bytes(), 16);
        let place = self.folder.join(name);
        match std::fs::read(&place) {
            Ok(bytes) => return Ok(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(of(LinkCause::Here, format!("{}: {e}", place.display()))),
        }
        if self.offline {
            return Err(of(LinkCause::Network, "is not here, and HF_HUB_OFFLINE forbids to fetch it".into()));
        }
        let mut tried = 0;
        let bytes = loop {
            tried += 1;
            match self.fetch(link) {
                Ok(bytes) => break bytes,
                Err((passing, message)) if !passing || tried == TRIES => {
                    let tries = if tried > 1 { format!(" (tried {tried} times)") } else { String::new() };
                    let cause = if passing { LinkCause::Network } else { LinkCause::Link };
                    return Err(of(cause, format!("{message}{tries}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(250 << tried)),
            }
        };
        write_atomic(&place, |w| w.write_all(&bytes)).map_err(|e| of(LinkCause::Here, e.to_string()))?;
        Ok(bytes)
    }

    /// The bool says whether another try may help.
    fn fetch(&self, link: &str) -> Result<Vec<u8>, (bool, String)> {
        let mut response =
            self.agent.get(link).call().map_err(|e| (true, format!("cannot be reached: {e}")))?;
        match response.status().as_u16() {
            200 => {}
            status @ (408 | 425 | 429 | 500..=599) => {
                return Err((true, format!("the server answers with status {status}")));
            }
            status => return Err((false, format!("the server answers with status {status}"))),
        }
        let body = response.body_mut().with_config().limit(LARGEST_PICTURE);
        body.read_to_vec().map_err(|e| match e {
            ureq::Error::BodyExceedsLimit(_) => {
                (false, format!("is larger than {} MB", LARGEST_PICTURE >> 20))
            }
            e => (true, format!("broke off: {e}")),
        })
    }
}
