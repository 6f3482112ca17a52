//! Which of this host's interfaces the hub listens on: one, that the other hosts can reach.

use std::io;
use std::net::{IpAddr, UdpSocket};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("PANGLOT_INTERFACE = {wanted:?} is no interface of {host}; it has {}", known.join(", "))]
    NoSuch {
        wanted: String,
        host: String,
        known: Vec<String>,
    },
    #[error(
        "{host} has no address but its loopback's, which the ranks on other hosts cannot reach; bring its network up, or name \
         the interface with PANGLOT_INTERFACE"
    )]
    LoopbackOnly { host: String },
}

impl Interface {
    fn is_loopback(&self) -> bool {
        self.addresses.iter().all(IpAddr::is_loopback)
    }

    /// Fast fabrics first, what containers and virtual machines bring last.
    fn preference(&self) -> usize {
        let starts = |names: &[&str]| names.iter().any(|name| self.name.starts_with(name));
        match () {
            () if starts(&["hsn", "ib"]) => 0,
            () if starts(&["en", "eth", "bond", "eno", "ens"]) => 1,
            () if starts(&["docker", "virbr", "br-", "cni", "flannel", "cali", "lxc", "tun", "tap"]) => 3,
            () => 2,
        }
    }
}

/// Every interface that is up, with the addresses that can be connected to by themselves (no link-local ones).
pub fn interfaces() -> io::Result<Vec<Interface>> {
    use nix::net::if_::InterfaceFlags;
    let mut found: Vec<Interface> = Vec::new();
    for entry in nix::ifaddrs::getifaddrs()? {
        let Some(address) = entry.address.filter(|_| entry.flags.contains(InterfaceFlags::IFF_UP)) else {
            continue;
        };
        let address = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) => IpAddr::V6(v6.ip()),
            _ => continue,
        };
        if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            continue;
        }
        match found
            .iter_mut()
            .find(|interface| interface.name == entry.interface_name)
        {
            Some(interface) => interface.addresses.push(address),
            None => found.push(Interface {
                name: entry.interface_name,
                addresses: vec![address],
            }),
        }
    }
    Ok(found)
}

/// The one to listen on: the one that is named; loopback where no other host takes part; the one on the way to `near` (an
/// address of the cluster); the likeliest.
pub fn choose(
    interfaces: &[Interface],
    host: &str,
    wanted: Option<&str>,
    one_host: Option<bool>,
    near: Option<IpAddr>,
) -> Result<Interface, AddressError> {
    if let Some(wanted) = wanted {
        let named = interfaces.iter().find(|interface| interface.name == wanted);
        return match named {
            Some(interface) if one_host == Some(false) && interface.is_loopback() => {
                Err(AddressError::LoopbackOnly { host: host.into() })
            }
            Some(interface) => Ok(interface.clone()),
            None => Err(AddressError::NoSuch {
                wanted: wanted.into(),
                host: host.into(),
                known: interfaces.iter().map(|interface| interface.name.clone()).collect(),
            }),
        };
    }
    let loopback = interfaces.iter().find(|interface| interface.is_loopback());
    if let Some(loopback) = loopback.filter(|_| one_host == Some(true)) {
        return Ok(loopback.clone());
    }
    let on_the_way = near.and_then(|near| {
        interfaces
            .iter()
            .find(|interface| !interface.is_loopback() && interface.addresses.contains(&near))
    });
    let likeliest = || {
        interfaces
            .iter()
            .filter(|i| !i.is_loopback())
            .min_by_key(|i| i.preference())
    };
    // Where nobody says how many hosts there are, it may be one without a network.
    let alone = || loopback.filter(|_| one_host.is_none());
    let chosen = on_the_way.or_else(likeliest).or_else(alone).cloned();
    chosen.ok_or_else(|| AddressError::LoopbackOnly { host: host.into() })
}

/// This host's address on the way to another. Nothing is sent.
pub fn towards(other: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match other {
        IpAddr::V4(_) => [0, 0, 0, 0].into(),
        IpAddr::V6(_) => [0u16; 8].into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((other, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, address: &str) -> Interface {
        Interface {
            name: name.into(),
            addresses: vec![address.parse().unwrap()],
        }
    }

    #[test]
    fn one_interface_is_chosen_and_loopback_only_within_a_host() {
        let all = [
            interface("lo", "127.0.0.1"),
            interface("docker0", "172.17.0.1"),
            interface("eth0", "10.0.0.1"),
            interface("hsn0", "10.1.0.1"),
        ];
        let name = |wanted, one_host: bool, near: Option<&str>| {
            choose(
                &all,
                "n1",
                wanted,
                Some(one_host),
                near.map(|near| near.parse().unwrap()),
            )
            .map(|found| found.name)
        };
        assert_eq!(name(None, true, None).unwrap(), "lo");
        assert_eq!(name(None, false, None).unwrap(), "hsn0");
        assert_eq!(name(None, false, Some("10.0.0.1")).unwrap(), "eth0");
        assert_eq!(name(Some("docker0"), false, None).unwrap(), "docker0");
        assert_eq!(
            name(Some("eth7"), false, None).unwrap_err().to_string(),
            "PANGLOT_INTERFACE = \"eth7\" is no interface of n1; it has lo, docker0, eth0, hsn0"
        );
        let refused = AddressError::LoopbackOnly { host: "n1".into() };
        assert_eq!(name(Some("lo"), false, None), Err(refused));
        assert!(choose(&all[..1], "n1", None, Some(false), None).is_err());
        assert_eq!(choose(&all, "n1", None, None, None).unwrap().name, "hsn0");
        assert_eq!(choose(&all[..1], "n1", None, None, None).unwrap().name, "lo");
    }

    #[test]
    fn this_machine_has_its_loopback() {
        let found = interfaces().unwrap();
        assert!(
            choose(&found, "here", None, Some(true), None).unwrap().is_loopback(),
            "{found:?}"
        );
        assert_eq!(towards([127, 0, 0, 1].into()), Some([127, 0, 0, 1].into()));
    }
}
