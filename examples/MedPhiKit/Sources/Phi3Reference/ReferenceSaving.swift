import Foundation
import Phi3Core

/// How changed weights are stored.
public enum SavePrecision: Sendable {
    /// As the base stores them. A quantised base refuses: a change is smaller than its grid's steps.
    case same
    /// In half precision; quantised layers are unpacked.
    case half
}

extension ReferenceModel {
    /// Writes the model with its adapter folded in, so that `mlx_medphi` and this package load it.
    ///
    /// What did not change is copied byte for byte; sums are made in single precision and rounded
    /// once. The file or folder appears complete or not at all.
    ///
    /// - Parameters:
    ///   - url: a name ending in `.safetensors` makes one self-describing file, whose tokenizer is the
    ///     base's; any other name a folder with the tokenizer's files.
    ///   - precision: how changed weights are stored.
    ///   - replace: whether what is there is replaced.
    /// - Throws: `Phi3Error`: something in the way, a full disk, a quantised base with `.same`, or a
    ///   weight that half precision does not hold.
    public func save(
        _ url: URL, precision: SavePrecision = .same, replace: Bool = false
    ) throws {
        guard let checkpoint else {
            throw Phi3Error.file(
                ErrorDetails(
                    place: url.path, found: "a model out of a bundle's package",
                    expected: "one out of a checkpoint",
                    advice: "Copy the bundle with its adapter, or load the checkpoint it was "
                        + "exported from."))
        }
        try checkPlace(url, checkpoint, precision)
        let pieces = try pieces(checkpoint, precision)
        let config = try configText(checkpoint, precision)
        if url.pathExtension == "safetensors" {
            try SafetensorsWriter.write(
                to: url, pieces: pieces, metadata: try fileMetadata(checkpoint, config),
                replace: replace)
            return
        }
        try FolderWriter.write(to: url, replace: replace) { folder in
            try folder.copy(companions(checkpoint), from: checkpoint.folder)
            try folder.write(Data(config.utf8), name: "config.json")
            try SafetensorsWriter.write(
                to: folder.url.appendingPathComponent("model.safetensors"), pieces: pieces,
                metadata: [(name: "format", text: "pt")])
        }
    }

    /// Writes the adapter that is on the model; see `Adapter.write`.
    ///
    /// - Parameters:
    ///   - url: a name ending in `.safetensors` makes one file, any other a folder.
    ///   - type: how the factors are stored; `nil` keeps theirs.
    ///   - replace: whether an older adapter there is replaced.
    /// - Throws: `Phi3Error`: no adapter, something in the way, a full disk.
    public func saveLoRA(
        _ url: URL, as type: TensorType? = nil, replace: Bool = false
    ) throws {
        guard let adapter else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: url.path, found: "a model without adapter", expected: "one to save",
                    advice: "Apply an adapter first."))
        }
        try adapter.write(to: url, as: type, replace: replace)
    }

    private func checkPlace(
        _ url: URL, _ checkpoint: Checkpoint, _ precision: SavePrecision
    ) throws {
        func refused(_ found: String, _ expected: String, _ advice: String) -> Phi3Error {
            .file(ErrorDetails(place: url.path, found: found, expected: expected, advice: advice))
        }
        let quantized = checkpoint.quantizedLayers
        if precision == .same, let adapter,
            let lost = adapter.sites.first(where: { quantized[$0.name] != nil })
        {
            throw refused(
                "\(lost.name) is quantised, and rounding to its grid would lose the training",
                "precision .half", "Keep the adapter beside the base, or save in half precision.")
        }
        if FileBytes.overlap(url, checkpoint.url) {
            throw refused("the base itself", "another place", "Choose another name.")
        }
    }

    /// Every tensor of the saved model, in the order of the base.
    private func pieces(
        _ checkpoint: Checkpoint, _ precision: SavePrecision
    ) throws -> [TensorPiece] {
        let quantized = checkpoint.quantizedLayers
        var pieces: [TensorPiece] = []
        for (name, tensor) in checkpoint.storedTensors() {
            let dot = name.lastIndex(of: ".") ?? name.endIndex
            let layer = String(name[..<dot])
            let isWeight = name.hasSuffix(".weight")
            let change = adapter?.changes.first { $0.key.name == layer }
            if quantized[layer] != nil, precision == .half {
                // Codes, scales and biases become one weight, where the codes stand.
                if isWeight { pieces.append(plain(name, layer, change, as: .f16)) }
            } else if let change, isWeight {
                pieces.append(
                    plain(name, layer, change, as: precision == .half ? .f16 : tensor.type))
            } else if precision == .half, tensor.type.isWeight, tensor.type != .f16 {
                let values = tensor.floats()
                pieces.append(
                    TensorPiece(name: name, type: .f16, shape: tensor.shape) { write in
                        try write(
                            ReferenceModel.rounded(
                                name, Tensor(values, shape: tensor.shape, as: .f16)))
                    })
            } else {
                pieces.append(TensorPiece(name: name, tensor))
            }
        }
        return pieces
    }

    /// A plain weight with its change, if it has one, rounded once.
    private func plain(
        _ name: String, _ layer: String, _ change: (key: ProjectionSite, value: LowRank)?,
        as type: TensorType
    ) -> TensorPiece {
        let matrix = checkpoint.flatMap { WeightMatrix($0, layer: layer) }
        let shape = [matrix?.rows ?? 0, matrix?.columns ?? 0]
        let scale = adapter?.scaling.scale ?? 0
        return TensorPiece(name: name, type: type, shape: shape) { write in
            guard let matrix else { return }
            var linear = Linear(matrix, expanded: true)
            if let change { linear = SideChange.adapted(linear, change.value, scale: scale) }
            let tensor = Tensor(linear.floats(), shape: shape, as: type)
            try write(ReferenceModel.rounded(name, tensor))
        }
    }

    private static func rounded(_ name: String, _ tensor: Tensor) throws -> Data {
        if !tensor.isFinite {
            throw Phi3Error.file(
                ErrorDetails(
                    place: name, found: "numbers beyond what \(tensor.type.rawValue) holds",
                    expected: "finite ones", advice: "Keep the adapter beside the base."))
        }
        return tensor.data
    }

    /// config.json of the saved model: the base's own text, but where layers are unpacked.
    private func configText(
        _ checkpoint: Checkpoint, _ precision: SavePrecision
    ) throws -> String {
        guard precision == .half, var members = try JSONValue(parsing: checkpoint.configText).object
        else { return checkpoint.configText }
        members["quantization"] = nil
        members["quantization_config"] = nil
        // Loaders that follow this would round the weights a second time.
        members[members["dtype"] != nil ? "dtype" : "torch_dtype"] = "float16"
        return JSONValue.object(members).text(.pretty) + "\n"
    }

    /// What a single file says about itself.
    private func fileMetadata(
        _ checkpoint: Checkpoint, _ config: String
    ) throws -> [(name: String, text: String)] {
        var facts = [(name: "format", text: "pt"), (name: "config", text: config)]
        facts.append((name: "kind", text: "medphi-fused"))
        facts.append((name: "base_fingerprint", text: fingerprint.text))
        let generation = checkpoint.folder.appendingPathComponent("generation_config.json")
        if let data = try? Data(contentsOf: generation) {
            facts.append((name: "generation_config", text: String(decoding: data, as: UTF8.self)))
        }
        let tokenizer = checkpoint.folder.appendingPathComponent("tokenizer.json")
        if FileBytes.kind(of: tokenizer) == .file {
            facts.append((name: "tokenizer_sha256", text: try SHA256.hex(contentsOf: tokenizer)))
        }
        return facts
    }

    /// Files of the base's folder that belong to the model; an adapter or a log there does not.
    private func companions(_ checkpoint: Checkpoint) -> [String] {
        let names =
            (try? FileManager.default.contentsOfDirectory(atPath: checkpoint.folder.path)) ?? []
        let whole = [
            "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
            "generation_config.json",
        ]
        let fronts =
            ["tokenizer", "chat_template"] + (checkpoint.isSingleFile ? [] : ["LICENSE", "NOTICE"])
        return names.filter { name in
            whole.contains(name) || fronts.contains { name.hasPrefix($0) }
        }.sorted()
    }
}
