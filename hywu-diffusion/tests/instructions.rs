//! The text tower's first lessons.

use hywu_diffusion::{Backbone, BackboneConfig, EditData, Error, TextEncoder, learn_instructions};
use std::ops::ControlFlow;

#[test]
fn the_tower_learns_to_name_skills_and_nothing_else_moves() {
    let config = BackboneConfig {
        width: 32,
        layers: 1,
        head_dim: 16,
        mlp_hidden: 32,
        text_layers: 1,
        ..Default::default()
    };
    let mut backbone =
        Backbone::new(config, TextEncoder::table().expect("bundled"), 1).expect("a good config");
    let encoder = TextEncoder::bundled(20).expect("bundled");
    let skills = EditData::skills(&["brighter".into(), "darker".into(), "recolour".into()]).expect("known");
    let before = backbone.params.clone();
    let mut losses = Vec::new();
    let mut go = |_: u64, loss: f32| {
        losses.push(loss);
        ControlFlow::Continue(())
    };
    learn_instructions(&mut backbone, &encoder, &skills, 60, 1, &mut go).expect("finite");
    assert_eq!(losses.len(), 60);
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
    for ((name, new), (_, old)) in backbone.params.iter().zip(before.iter()) {
        let text = name.starts_with("text") && !name.starts_with("text_pool");
        assert_eq!(new.data() != old.data(), text, "{name}");
    }
    let stopped =
        learn_instructions(&mut backbone, &encoder, &skills, 60, 1, &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted)));
}
