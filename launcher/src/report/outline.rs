//! The world's land as outlines: TopoJSON as the npm package `world-atlas` has it (made from Natural Earth, public domain),
//! which set-up fetches. A map without it has meridians and parallels only.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

/// Where set-up leaves the package, below the repository.
const FILE: &str = ".panglot/npm/world-atlas-2.0.2/land-110m.json";

/// Rings of longitude and latitude, in tenths of a degree, one number after the other; empty where no package is there.
pub fn land() -> Vec<Vec<i32>> {
    // From where one works, or else where this program was built: set-up was run there.
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let places: [PathBuf; 2] = [PathBuf::from(FILE), built.join(FILE)];
    let text = places.iter().find_map(|file| fs::read(file).ok());
    // A map needs no more than its dots: a file that is not what it should be is as good as none.
    text.and_then(|text| rings(&text).ok()).unwrap_or_default()
}

#[derive(Deserialize)]
struct Topology {
    objects: Objects,
    /// Points as differences to the one before, in steps of the transform.
    arcs: Vec<Vec<[f64; 2]>>,
    transform: Transform,
}

#[derive(Deserialize)]
struct Objects {
    land: Collection,
}

#[derive(Deserialize)]
struct Collection {
    geometries: Vec<Geometry>,
}

#[derive(Deserialize)]
struct Geometry {
    /// Polygons of rings of arcs; an arc −1 − i is arc i backwards.
    arcs: Vec<Vec<Vec<i64>>>,
}

#[derive(Deserialize)]
struct Transform {
    scale: [f64; 2],
    translate: [f64; 2],
}

fn rings(topojson: &[u8]) -> Result<Vec<Vec<i32>>> {
    let topology: Topology = serde_json::from_slice(topojson)?;
    let Transform { scale, translate } = topology.transform;
    let absolute = |arc: &Vec<[f64; 2]>| -> Vec<[i32; 2]> {
        let mut at = [0.0, 0.0];
        let mut points = Vec::with_capacity(arc.len());
        for step in arc {
            at = [at[0] + step[0], at[1] + step[1]];
            points.push([0, 1].map(|axis| (10.0 * (at[axis] * scale[axis] + translate[axis])).round() as i32));
        }
        points
    };
    let arcs: Vec<_> = topology.arcs.iter().map(absolute).collect();
    let mut rings = Vec::new();
    for ring in topology
        .objects
        .land
        .geometries
        .iter()
        .flat_map(|geometry| geometry.arcs.iter().flatten())
    {
        let mut points: Vec<[i32; 2]> = Vec::new();
        for &index in ring {
            let backwards = index < 0;
            let at = if backwards { -1 - index } else { index };
            let arc = usize::try_from(at).ok().and_then(|at| arcs.get(at));
            let arc = arc.context("a ring names an arc that is not there")?;
            if backwards {
                points.extend(arc.iter().rev());
            } else {
                points.extend(arc);
            }
        }
        points.dedup();
        // Nobody lives there who speaks a language of a corpus, and it would take a quarter of the map.
        if points.iter().any(|[_, latitude]| *latitude > -600) {
            rings.extend(
                within_the_map(&points)
                    .into_iter()
                    .map(|ring| ring.into_iter().flatten().collect()),
            );
        }
    }
    Ok(rings)
}

/// A ring that crosses 180° is walked on beyond it, and then shown at both edges, each time as far as the map goes.
fn within_the_map(ring: &[[i32; 2]]) -> Vec<Vec<[i32; 2]>> {
    let mut turns = 0;
    let mut unrolled: Vec<[i32; 2]> = Vec::with_capacity(ring.len());
    for (at, &[longitude, latitude]) in ring.iter().enumerate() {
        let before = ring[at.saturating_sub(1)][0];
        turns += match longitude - before {
            ..-1800 => 1,
            1801.. => -1,
            _ => 0,
        };
        unrolled.push([longitude + 3600 * turns, latitude]);
    }
    let shown = |turns: i32| -> Vec<[i32; 2]> {
        let moved = unrolled
            .iter()
            .map(|[longitude, latitude]| [longitude + 3600 * turns, *latitude]);
        moved
            .map(|[longitude, latitude]| [longitude.clamp(-1800, 1800), latitude])
            .collect()
    };
    let has_area = |ring: &Vec<[i32; 2]>| ring.iter().any(|point| point[0] != ring[0][0]);
    [0, -1, 1].map(shown).into_iter().filter(has_area).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arcs_are_added_up_and_read_both_ways() {
        let square = r#"{"type":"Topology","objects":{"land":{"type":"GeometryCollection","geometries":[
            {"type":"MultiPolygon","arcs":[[[0,-2]],[[2]]]}]}},
            "arcs":[[[0,0],[10,0],[0,10]],[[0,0],[0,10],[10,0]],[[0,-700],[10,0],[0,10]]],
            "transform":{"scale":[0.1,0.1],"translate":[5,0]}}"#;
        let expected = vec![vec![50, 0, 60, 0, 60, 10, 50, 10, 50, 0]];
        assert_eq!(
            rings(square.as_bytes()).unwrap(),
            expected,
            "and what lies in the far south is left out"
        );
        let across = within_the_map(&[[1700, 0], [-1700, 0], [-1700, 100], [1700, 100], [1700, 0]]);
        let east = vec![[1700, 0], [1800, 0], [1800, 100], [1700, 100], [1700, 0]];
        let west = vec![[-1800, 0], [-1700, 0], [-1700, 100], [-1800, 100], [-1800, 0]];
        assert_eq!(across, [east, west], "180° is an edge, and no line across the map");
        let broken = square.replace("[0,-2]", "[0,-9]");
        assert!(rings(broken.as_bytes()).is_err());
        assert!(rings(b"{}").is_err());
    }

    #[test]
    fn the_package_that_set_up_fetches_is_read() {
        let rings = land();
        assert!(rings.len() > 100, "{} rings: run `make setup`", rings.len());
        assert!(rings.iter().flatten().all(|tenths| tenths.abs() <= 1800));
    }
}
