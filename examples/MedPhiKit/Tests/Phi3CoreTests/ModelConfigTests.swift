import Foundation
import Testing

@testable import Phi3Core

@Suite struct ModelConfigTests {
    private func raw(_ changes: [String: JSONValue?] = [:]) -> JSONValue {
        var members: JSONObject = [
            "model_type": "phi3", "vocab_size": 320.json, "hidden_size": 64.json,
            "intermediate_size": 96.json, "num_hidden_layers": 2.json,
            "num_attention_heads": 4.json,
            "max_position_embeddings": 4096.json,
        ]
        for (name, value) in changes { members[name] = value }
        return .object(members)
    }

    private func read(_ changes: [String: JSONValue?] = [:]) throws -> ModelConfig {
        try ModelConfig.fromHF(raw(changes))
    }

    private static func factors(_ count: Int, _ first: Double) -> JSONValue {
        .array((0..<count).map { .number(first + Double($0)) })
    }

    @Test func whatAFileLeavesOutHasPhi3sDefaults() throws {
        let config = try read()
        #expect(config.keyValueHeadCount == 4 && config.headSize == 16 && config.rotarySize == 16)
        #expect(config.normEpsilon == 1e-5 && config.ropeTheta == 10000)
        #expect(config.longRoPE == nil && config.slidingWindow == nil && config.quantization == nil)
        #expect(!config.tiesEmbeddings && config.switchLength == nil)
        let nulls = try read([
            "num_key_value_heads": .some(.null), "head_dim": .some(.null),
            "sliding_window": .some(.null),
            "rope_scaling": .some(.null), "tie_word_embeddings": .some(.null),
            "rms_norm_eps": .some(.null),
        ])
        #expect(nulls == config)
    }

    @Test func oldAndNewFormsOfRopeSettingsAreOne() throws {
        let old = try read(["rope_theta": 500.json, "partial_rotary_factor": .number(0.75)])
        let new = try read([
            "rope_parameters": .some([
                "rope_type": "default", "rope_theta": 500.json,
                "partial_rotary_factor": .number(0.75),
            ])
        ])
        #expect(old == new)
        #expect(old.rotarySize == 12 && old.ropeTheta == 500)
    }

    @Test(arguments: ["longrope", "su", "yarn"])
    func longRopeIsReadUnderAllItsNames(kind: String) throws {
        let scaling: JSONValue = [
            "type": .string(kind), "short_factor": Self.factors(8, 1),
            "long_factor": Self.factors(8, 2),
        ]
        let config = try read([
            "rope_scaling": .some(scaling), "original_max_position_embeddings": 1024.json,
        ])
        let long = try #require(config.longRoPE)
        #expect(
            long.shortFactor.first == 1 && long.longFactor.last == 9 && long.switchLength == 1024)
        // √(1 + ln(4096 / 1024) / ln 1024)
        #expect(abs(long.attentionFactor - 1.2.squareRoot()) < 1e-12)
        #expect(!config.usesLongFactors(length: 1024) && config.usesLongFactors(length: 1025))
    }

    @Test func statedFactorsOfLongRopeWin() throws {
        var scaling: JSONObject = [
            "rope_type": "longrope", "short_factor": Self.factors(8, 1),
            "long_factor": Self.factors(8, 1),
            "original_max_position_embeddings": 2048.json, "attention_factor": .number(1.5),
        ]
        let top = try read([
            "rope_parameters": .some(.object(scaling)),
            "original_max_position_embeddings": 1024.json,
        ])
        #expect(top.longRoPE?.attentionFactor == 1.5 && top.switchLength == 1024)
        scaling["attention_factor"] = nil
        scaling["factor"] = 1.json
        let plain = try read(["rope_parameters": .some(.object(scaling))])
        #expect(plain.longRoPE?.attentionFactor == 1 && plain.switchLength == 2048)
    }

    @Test func theOldRopeSettingsWinOverTheNew() throws {
        let new: JSONValue = ["rope_type": "default", "rope_theta": 7.json]
        let old: JSONValue = ["type": "default", "rope_theta": 5.json]
        #expect(
            try read(["rope_scaling": .some(old), "rope_parameters": .some(new)]).ropeTheta == 5)
        #expect(
            try read(["rope_scaling": .some(["a": .null]), "rope_parameters": .some(new)]).ropeTheta
                == 10000)
        #expect(
            try read(["rope_scaling": .some(.object(JSONObject())), "rope_parameters": .some(new)])
                .ropeTheta == 7)
    }

    @Test func quantisationIsReadWithItsExceptions() throws {
        let section: JSONValue = [
            "bits": 4.json, "group_size": 64.json, "mode": "affine", "lm_head": .bool(false),
            "model.embed_tokens": ["bits": 8.json, "group_size": 32.json], "other": .bool(true),
        ]
        let config = try read(["quantization": .some(section)])
        let quantization = try #require(config.quantization)
        #expect(quantization.form(of: "x") == .init(bits: 4, groupSize: 64))
        #expect(quantization.form(of: "lm_head") == nil)
        #expect(quantization.form(of: "model.embed_tokens") == .init(bits: 8, groupSize: 32))
        #expect(quantization.layers.count == 2)
        let again = try read(["quantization": .some(quantization.section)])
        #expect(again == config)
    }

    @Test(
        arguments: [
            ("model_type", "llama"), ("model_type", .null), ("hidden_act", "gelu"),
            ("attention_bias", .bool(true)),
            ("vocab_size", .null), ("vocab_size", 0.json), ("vocab_size", .number(320)),
            ("vocab_size", .bool(true)),
            ("vocab_size", .integer(1 << 31)), ("hidden_size", 65.json),
            ("num_key_value_heads", 3.json),
            ("num_hidden_layers", 10_001.json), ("head_dim", .integer(1 << 30)),
            ("intermediate_size", .integer(1 << 30)),
            ("rms_norm_eps", 0.json), ("rms_norm_eps", "1"), ("rope_theta", .number(-1)),
            ("sliding_window", 0.json),
            ("partial_rotary_factor", .number(0.01)), ("partial_rotary_factor", .number(1e308)),
            ("partial_rotary_factor", .number(0.2)), ("tie_word_embeddings", 1.json),
            ("rope_scaling", "linear"),
            ("rope_scaling", ["type": "linear"]), ("rope_scaling", ["type": "longrope"]),
            ("rope_parameters", .array([])), ("quantization", "4bit"),
            ("quantization_config", ["bits": 4.json]),
            ("quantization", ["bits": 7.json, "group_size": 64.json]),
            ("quantization", ["bits": 4.json]),
            ("quantization", ["bits": 4.json, "group_size": 64.json, "mode": "mxfp4"]),
        ] as [(String, JSONValue)])
    func impossibleValuesAreRefusedByName(name: String, value: JSONValue) {
        #expect {
            try read([name: .some(value)])
        } throws: { error in
            guard case Phi3Error.checkpoint(let details) = error else { return false }
            return details.place == "config.json" || details.place.contains("quantization")
        }
    }

    /// Each extent may be one of an array; all weights together leave 64 bits.
    @Test func weightsWithoutEndAreRefused() throws {
        let most = ModelConfig.mostWhole.json
        #expect(throws: Phi3Error.self) {
            try read([
                "hidden_size": most, "num_attention_heads": 1.json, "head_dim": most,
                "partial_rotary_factor": .number(1e-9 + 2 / Double(ModelConfig.mostWhole)),
                "intermediate_size": .integer(1 << 30 - 1),
            ])
        }
        #expect(throws: Phi3Error.self) { try read(["vocab_size": most, "hidden_size": most]) }
        #expect(throws: Phi3Error.self) {
            try read(["num_hidden_layers": 10_000.json, "intermediate_size": 1_000_000.json])
        }
        // Ten times Phi-3-medium.
        _ = try read([
            "vocab_size": 32064.json, "hidden_size": 16_384.json,
            "intermediate_size": 57_344.json, "num_hidden_layers": 40.json,
        ])
    }

    @Test func spoiledConfigsNeverCrash() throws {
        var generator = SplitMix(9)
        for name in ["longrope-long", "gqa", "partial-rotary-tied"] {
            let place = FileFixtures.phi3.appendingPathComponent("\(name)/config.json")
            let value = try FileBytes.json(place)
            for _ in 0..<FileFixtures.fuzzCount(700) {
                do {
                    let config = try ModelConfig.fromHF(Spoiler.value(value, &generator))
                    #expect(config.headCount % config.keyValueHeadCount == 0)
                    #expect(config.linearShapes().allSatisfy { $0.outputs > 0 && $0.inputs > 0 })
                } catch {
                    #expect(isReadable(error))
                }
            }
        }
    }
}
