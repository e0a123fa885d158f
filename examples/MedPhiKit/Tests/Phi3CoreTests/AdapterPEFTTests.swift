import Foundation
import Testing

@testable import Phi3Core

@Suite struct AdapterPEFTTests {
    @Test func featuresThatAreNotHereAreRefusedByName() throws {
        let settings: [(String, JSONValue)] = [
            ("bias", "all"), ("modules_to_save", .array(["lm_head"])), ("lora_bias", .bool(true)),
            ("init_lora_weights", "pissa"), ("peft_type", "LOHA"), ("fan_in_fan_out", .bool(true)),
            ("r", 0.json), ("lora_alpha", "8"), ("use_rslora", "yes"),
            ("lora_dropout", .number(1.5)),
            ("rank_pattern", ["(a+)+$": 4.json]), ("alpha_pattern", .array([1.json])),
            ("new_feature", 1.json),
        ]
        for (name, value) in settings {
            let folder = try Small.peftCopy([name: value])
            #expect(names(listedProblems { _ = try Adapter.read(folder.url) }, name), "\(name)")
        }
        // DoRA is another function of the same factors: without magnitudes it is refused.
        let dora = try Small.peftCopy(["use_dora": .bool(true)])
        #expect(throws: Phi3Error.self) { try Adapter.read(dora.url) }
    }

    @Test func patternsGiveModulesTheirOwnStrength() throws {
        let folder = try Small.peftCopy([
            "alpha_pattern": ["layers.1.self_attn.o_proj": 16.json, "o_proj": 4.json],
            "use_rslora": .bool(false),
        ])
        let plain = try Small.peftCopy(["use_rslora": .bool(false)])
        let own = try Adapter.read(folder.url)
        let usual = try Adapter.read(plain.url)
        for (site, factor) in [(0, Float(0.5)), (1, 2)] {
            let place = ProjectionSite(layer: site, projection: .o)
            let wanted = usual.changes[place]?.b.floats().map { $0 * factor }
            #expect(own.changes[place]?.b.floats() == wanted)
        }
    }

    @Test(arguments: [
        ("o_proj", "a.o_proj", true), ("o_proj", "a.go_proj", false), ("o_proj", "o_proj.b", false),
        ("^o_proj", "a.o_proj", false), ("^o_proj$", "o_proj", true),
        (#"layers\.\d+\.o"#, "model.layers.12.o", true),
        (#"layers\.\d+\.o"#, "model.layers.x.o", false), (".*o", "a.b.oo", true),
        ("a*b", "b", true),
        ("a+b", "b", false), ("a+b", "aab", true), ("l.o", "lxo", true),
    ])
    func patternsMatchAsPEFTsDo(pattern: String, name: String, matches: Bool) throws {
        #expect(try #require(PEFTPattern(pattern)).matches(name) == matches)
    }

    @Test(arguments: [
        "", "^", "a|b", "(a)", "a{2}", "[a]", "a**b*c*d*", "\\w", "a?", "é",
        String(repeating: "a", count: 201),
    ])
    func otherPatternsAreNotRead(pattern: String) {
        #expect(PEFTPattern(pattern) == nil)
    }

    @Test func separateLayersAreMergedExactly() throws {
        let folder = try TestFolder()
        let a = [Float](repeating: 0.5, count: 2 * 64)
        func module(_ name: String, _ outputs: Int, _ b: Float) -> [TensorPiece] {
            let front = "base_model.model.model.layers.0.\(name)"
            return [
                TensorPiece(name: "\(front).lora_A.weight", Tensor(a, shape: [2, 64])),
                TensorPiece(
                    name: "\(front).lora_B.weight",
                    Tensor([Float](repeating: b, count: outputs * 2), shape: [outputs, 2])),
            ]
        }
        let config: JSONValue = ["peft_type": "LORA", "r": 2.json, "lora_alpha": 4.json]
        try folder.write(config.text(), Adapter.configName)
        let pieces =
            module("self_attn.q_proj", 64, 1) + module("self_attn.v_proj", 64, 3)
            + module("mlp.gate_proj", 96, 5)
        try SafetensorsWriter.write(to: folder[Adapter.peftName], pieces: pieces, metadata: [])
        let adapter = try Adapter.read(folder.url, base: Checkpoint.open(Small.base))
        let qkv = try #require(adapter.changes[ProjectionSite(layer: 0, projection: .qkv)])
        #expect(qkv.a.shape == [64, 4] && qkv.b.shape == [4, 192])
        let b = qkv.b.floats()
        #expect(b[0] == 1 && b[64] == 0 && b[128] == 0 && b[2 * 192] == 0 && b[2 * 192 + 128] == 3)
        let gate = try #require(adapter.changes[ProjectionSite(layer: 0, projection: .gateUp)])
        #expect(gate.b.shape == [2, 192] && gate.b.floats()[95] == 5 && gate.b.floats()[96] == 0)
        // Keys are as wide as values, gate as up: only the queries of the model itself are not known.
        try SafetensorsWriter.write(
            to: folder[Adapter.peftName], pieces: module("self_attn.k_proj", 64, 1), metadata: [],
            replace: true)
        #expect(throws: Phi3Error.self) { try Adapter.read(folder.url) }
        _ = try Adapter.read(folder.url, base: Checkpoint.open(Small.base))
    }
}
