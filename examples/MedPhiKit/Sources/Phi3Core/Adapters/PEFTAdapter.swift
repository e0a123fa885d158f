import Foundation

/// PEFT's folder: A is (r, in), B (out, r), scaled by alpha / r or, with rsLoRA, alpha / √r, and every
/// module may have its own r and alpha. Here all layers get one scale, by a factor in B.
enum PEFTAdapter {
    private static let prefix = "base_model.model."
    // The last part of a name -> which tensor it is; some versions end the magnitude with ".weight".
    private static let ends = [
        ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector",
    ]

    /// Reads it as far as that goes.
    static func read(
        _ url: URL, _ config: JSONObject, _ base: Checkpoint?
    ) throws -> AdapterReading {
        let place = url.appendingPathComponent(Adapter.peftName)
        let old = url.appendingPathComponent("adapter_model.bin")
        if FileBytes.kind(of: place) == .missing, FileBytes.kind(of: old) == .file {
            throw Phi3Error.damaged(
                path: url.path, what: "holds adapter_model.bin, which runs code when it is read",
                expected: Adapter.peftName, advice: "Save the adapter with a newer PEFT.")
        }
        let problems = AdapterProblems()
        let settings = PEFTSettings(config, problems)
        let file = try SafetensorsFile(place)
        if file.header.tensors.isEmpty { throw DescribedAdapter.empty(place) }
        let tensors = Adapter.checkedTensors(file, problems)
        var modules: [PEFTModule: LowRank] = [:]
        for (module, parts) in sorted(tensors, problems) {
            let rank = settings.rank(of: module.name)
            let whole = parts.assembled(module.name, rank: rank, isDoRA: settings.isDoRA, problems)
            guard let whole else { continue }
            modules[module] = rescaled(whole, settings.scale(of: module.name) / settings.scale)
        }
        lost(modules, config, base, problems)
        let changes = UnfusedParts.merged(modules, base, problems)
        let rank = changes.values.map(\.rank).max() ?? 0
        let last = changes.keys.map(\.layer).max() ?? 0
        let adapter = Adapter(
            url: url, changes: changes,
            scaling: Adapter.Scaling(
                rank: rank, scale: settings.scale, isDoRA: settings.isDoRA,
                dropout: settings.dropout),
            modelLayers: max(base?.config.layerCount ?? 0, last + 1),
            origin: Adapter.Origin(
                baseName: Adapter.baseLabel(config["base_model_name_or_path"]?.string)), form: .peft
        )
        return AdapterReading(
            adapter: changes.isEmpty ? nil : adapter, problems: problems.lines,
            what: "cannot be used as an adapter of Phi-3",
            advice: "Load it on its base model, or save, merge or convert it with PEFT.")
    }

    private static func sorted(
        _ tensors: [String: Tensor], _ problems: AdapterProblems
    ) -> [PEFTModule: AdapterParts] {
        var parts: [PEFTModule: AdapterParts] = [:]
        for (name, tensor) in tensors {
            guard name.hasPrefix(prefix), let end = ends.first(where: { name.hasSuffix($0) }),
                let module = PEFTModule(String(name.dropFirst(prefix.count).dropLast(end.count)))
            else {
                problems.add(AdapterParts.unknown(name))
                continue
            }
            switch end {
            case ".lora_A.weight": parts[module, default: AdapterParts()].a = tensor.transposed()
            case ".lora_B.weight": parts[module, default: AdapterParts()].b = tensor.transposed()
            default: parts[module, default: AdapterParts()].m = tensor
            }
        }
        return parts
    }

    private static func rescaled(_ change: LowRank, _ ratio: Double) -> LowRank {
        // Untouched when there is nothing to do: the usual adapter keeps its bits and its kind.
        if ratio == 1 { return change }
        let b = change.b.floats().map { $0 * Float(ratio) }
        return LowRank(a: change.a, b: Tensor(b, shape: change.b.shape), m: change.m)
    }

    /// Modules that the configuration promises and the file lacks, as far as it says so plainly.
    private static func lost(
        _ modules: [PEFTModule: LowRank], _ config: JSONObject, _ base: Checkpoint?,
        _ problems: AdapterProblems
    ) {
        guard let targets = config["target_modules"]?.array, !modules.isEmpty,
            !targets.contains(where: { $0.string?.contains(".") ?? true }),
            config["exclude_modules"]?.isTruthy != true
        else { return }
        let layers: [Int]
        if let one = config["layers_to_transform"]?.integer {
            layers = [one]
        } else if let some = config["layers_to_transform"]?.array, !some.isEmpty {
            layers = some.compactMap(\.integer)
        } else {
            let last = modules.keys.map(\.layer).max() ?? 0
            layers = Array(0..<max(base?.config.layerCount ?? 0, last + 1))
        }
        for name in Set(modules.keys.map(\.key)) {
            for layer in layers where modules[PEFTModule(layer: layer, key: name)] == nil {
                problems.add("model.layers.\(layer).\(name): missing, other layers have it")
            }
        }
    }
}

/// A module that PEFT can change: one of Phi-3's projections, or a part of one by itself.
struct PEFTModule: Hashable {
    let layer: Int
    let key: String

    /// Names of separate layers, in the order in which Phi-3 stacks their rows.
    static let parts: [Projection: [String]] = [
        .qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        .gateUp: ["mlp.gate_proj", "mlp.up_proj"],
    ]

    init(layer: Int, key: String) {
        self.layer = layer
        self.key = key
    }

    /// A module by its name in a checkpoint; `nil` for names that Phi-3 does not have.
    init?(_ name: String) {
        let pieces = name.split(separator: ".", omittingEmptySubsequences: false)
        guard pieces.count == 5, pieces[0] == "model", pieces[1] == "layers",
            let layer = Adapter.layerNumber(pieces[2])
        else { return nil }
        let key = "\(pieces[3]).\(pieces[4])"
        guard Projection(key: key) != nil || PEFTModule.parts.values.joined().contains(key) else {
            return nil
        }
        self.init(layer: layer, key: key)
    }

    var name: String { "model.layers.\(layer).\(key)" }
}
