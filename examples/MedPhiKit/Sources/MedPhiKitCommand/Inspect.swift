import Foundation
import MedPhiKit
import Phi3Reference

/// `inspect`: what a model is, how large, and whether it fits into memory.
enum Inspect {
    static let verb = Verb(
        name: "inspect", summary: "Say what a bundle or a checkpoint is and what it needs.",
        places: [Verb.model],
        options: [
            Verb.Option("context", "N", "Tokens to plan the memory for [default: the model's]."),
            Verb.json,
        ],
        examples: [
            "medphi-kit inspect notes.medphi", "medphi-kit inspect notes.medphi --json",
            "medphi-kit inspect models/phi-3-mini --context 4096",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        let url = try arguments.url("MODEL")
        let context = try arguments.whole("context", or: 0, 1...10_000_000)
        let facts =
            Reading.isBundle(url)
            ? try bundle(url, context) : try checkpoint(url, context)
        if arguments.has("json") {
            console.print(.object(JSONObject(facts.map { (name: $0.key, value: $0.value) })))
        } else {
            console.print(
                Console.table(
                    facts.compactMap { fact in
                        fact.text.map { (fact.label, $0) }
                    }))
        }
        return 0
    }

    /// One line for people, one member for machines.
    private struct Fact {
        let key: String
        let label: String
        let value: JSONValue
        let text: String?

        init(_ key: String, _ label: String, _ value: JSONValue, _ text: String?) {
            (self.key, self.label, self.value, self.text) = (key, label, value, text)
        }
    }

    private static func bundle(_ url: URL, _ context: Int) throws -> [Fact] {
        let bundle = try ModelBundle.open(url, check: false)
        let manifest = bundle.manifest
        let ours = manifest.medphi
        let adapters = ours.adapters.list
        let names = adapters.map { "\($0.name) (rank \($0.rank))" }.joined(separator: ", ")
        let tokens = context > 0 ? context : ours.coreml.contextLength
        let needs = MemoryNeeds(
            weights: ours.memory.weights, keyValuePerToken: ours.memory.kvPerToken,
            adapters: ours.memory.adapterSlots, takesWholeContext: true)
        let systems = ours.coreml.minOS.map { "\($0.key) \($0.value)" }.sorted()
        return [
            Fact("name", "name", .string(manifest.name), manifest.name),
            Fact("kind", "kind", "bundle", "bundle, schema \(ours.schema)"),
            Fact("base", "base", .string(manifest.source.modelID), manifest.source.modelID),
            Fact(
                "base_fingerprint", "fingerprint", .string(ours.baseFingerprint.text),
                ours.baseFingerprint.short),
            Fact("licence", "licence", .string(manifest.source.licence), manifest.source.licence),
            Fact("bytes", "size", .integer(bundle.byteCount), Console.size(bundle.byteCount)),
            Fact("weights", "weights", .string(manifest.compression), manifest.compression),
            Fact(
                "context_length", "context", .integer(ours.coreml.contextLength),
                "\(ours.coreml.contextLength) tokens for conversation and note together"),
            Fact(
                "adapters", "adapters",
                .array(adapters.map { ["name": .string($0.name), "rank": .integer($0.rank)] }),
                "\(ours.adapters.mode.rawValue)\(names.isEmpty ? "" : ": \(names)")"),
            Fact("adapter_mode", "", .string(ours.adapters.mode.rawValue), nil),
            Fact(
                "runs_on", "runs on", .array(systems.map { .string($0) }),
                "\(systems.joined(separator: ", ")); advised: "
                    + ours.coreml.recommendedUnits.rawValue),
            Fact(
                "verification", "verified", .string(ours.verification.level.rawValue),
                verified(ours.verification.level)),
        ] + memory(needs, tokens)
    }

    private static func verified(_ level: Manifest.Verification.Level) -> String {
        switch level {
        case .none: "not at all"
        case .spec: "its program was read part by part, and not run"
        case .graph: "its program was computed on another machine; not on Apple hardware"
        case .predict: "Core ML computed it on Apple hardware"
        }
    }

    private static func checkpoint(_ url: URL, _ context: Int) throws -> [Fact] {
        let checkpoint = try Checkpoint.open(url)
        let backend = try ReferenceBackend(checkpoint).facts
        let config = checkpoint.config
        let tokens = context > 0 ? context : config.maxPositions
        let fingerprint = backend.target.fingerprint
        let quantized = checkpoint.quantizedLayers.count
        return [
            Fact(
                "name", "name", .string(url.lastPathComponent), url.lastPathComponent),
            Fact(
                "kind", "kind", "checkpoint",
                checkpoint.isSingleFile ? "checkpoint in one file" : "checkpoint"),
            Fact("base_fingerprint", "fingerprint", .string(fingerprint.text), fingerprint.short),
            Fact(
                "bytes", "size", .integer(checkpoint.byteCount),
                Console.size(checkpoint.byteCount)),
            Fact("layers", "blocks", .integer(config.layerCount), "\(config.layerCount)"),
            Fact("hidden_size", "width", .integer(config.hiddenSize), "\(config.hiddenSize)"),
            Fact(
                "quantized_layers", "quantised", .integer(quantized),
                quantized == 0 ? nil : "\(quantized) layers"),
            Fact(
                "context_length", "context", .integer(config.maxPositions),
                "\(config.maxPositions) tokens"),
        ] + memory(backend.memory, tokens)
    }

    private static func memory(_ needs: MemoryNeeds, _ context: Int) -> [Fact] {
        let plan = MemoryPlan(needs, context: context, available: SystemMemory.available())
        let free = plan.available.map { "\(Console.size($0)) are free" } ?? "free memory not known"
        var verdict: JSONValue = "fits"
        var words = "it fits"
        switch plan.verdict {
        case .fits: break
        case .reduceContext(let tokens):
            (verdict, words) = ("reduce_context", "it fits with a context of \(tokens) tokens")
        case .refuse: (verdict, words) = ("refuse", "it does not fit")
        }
        let value: JSONValue = [
            "context": .integer(context), "needed": .integer(plan.needed),
            "weights": .integer(needs.weights), "kv_per_token": .integer(needs.keyValuePerToken),
            "adapters": .integer(needs.adapters),
            "available": plan.available.map { .integer($0) } ?? .null, "verdict": verdict,
        ]
        return [
            Fact(
                "memory", "memory", value,
                "\(Console.size(plan.needed)) as computed, not measured, for \(context) tokens; "
                    + "\(free): \(words)")
        ]
    }
}
