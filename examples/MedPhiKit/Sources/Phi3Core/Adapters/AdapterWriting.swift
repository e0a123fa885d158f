import Foundation

extension Adapter {
    /// Files of an adapter's folder that a newer adapter may replace; any other stops it.
    private static let replaceable: Set<String> = [configName, mlxName, peftName]
    /// What this package calls itself in files.
    static let writer = "MedPhiKit 0.1.0"

    /// Writes the adapter, complete or not at all.
    ///
    /// - Parameters:
    ///   - url: a name ending in `.safetensors` makes the single file that `mlx_medphi` reads; any
    ///     other name a folder that mlx-lm, mlx-swift-lm and PEFT load too.
    ///   - type: F32, F16 or BF16 for the factors; `nil` keeps theirs. Magnitudes of DoRA stay in
    ///     single precision, because what was learned is a small part of each.
    ///   - replace: whether an older adapter there is replaced; anything else never is.
    /// - Throws: `Phi3Error`: something in the way, values that the kind does not hold, a full disk.
    public func write(to url: URL, as type: TensorType? = nil, replace: Bool = false) throws {
        let stored = try storedAs(type, url)
        if url.pathExtension == "safetensors" {
            try Adapter.checkFile(url, replace)
            try stored.writeFile(url, replace)
            return
        }
        let isThere = try Adapter.checkFolder(url, replace)
        try AtomicFile.folder(at: url, replace: isThere) { folder in
            try stored.writeFile(folder.appendingPathComponent(Adapter.mlxName), false)
            try SafetensorsWriter.write(
                to: folder.appendingPathComponent(Adapter.peftName), pieces: stored.peftPieces(),
                metadata: [(name: "format", text: "pt")])
            let text = stored.folderConfig().text(.pretty) + "\n"
            let place = folder.appendingPathComponent(Adapter.configName)
            try AtomicFile.write(to: place, replace: false) { try $0.write(Data(text.utf8)) }
        }
    }

    private func writeFile(_ url: URL, _ replace: Bool) throws {
        let pieces = tensors().map { TensorPiece(name: $0.name, $0.tensor) }
        try SafetensorsWriter.write(
            to: url, pieces: pieces, metadata: fileMetadata(), replace: replace)
    }

    /// The adapter with one rank for all layers and its factors in the kind they are stored in.
    private func storedAs(_ type: TensorType?, _ url: URL) throws -> Adapter {
        var stored: [ProjectionSite: LowRank] = [:]
        for (site, change) in changes {
            let a = change.a.padded(columns: scaling.rank)
            let b = change.b.padded(rows: scaling.rank)
            guard let type else {
                stored[site] = LowRank(a: a, b: b, m: change.m)
                continue
            }
            let one = Tensor(a.floats(), shape: a.shape, as: type)
            let two = Tensor(b.floats(), shape: b.shape, as: type)
            guard type.isWeight, one.isFinite, two.isFinite else {
                throw Adapter.refused(
                    url, "cannot be stored as \(type.rawValue)",
                    ["\(site.name): holds values that \(type.rawValue) does not"],
                    advice: "Store it as F32.")
            }
            let m = change.m.map { Tensor($0.floats(), shape: $0.shape) }
            stored[site] = LowRank(a: one, b: two, m: m)
        }
        return Adapter(
            url: self.url, changes: stored, scaling: scaling, modelLayers: modelLayers,
            origin: origin, form: .file)
    }

    private func fileMetadata() -> [(name: String, text: String)] {
        let values: [(String, JSONValue)] = [
            ("version", .integer(Adapter.fileVersion)), ("rank", .integer(scaling.rank)),
            ("scale", .number(scaling.scale)),
            ("alpha", .number(scaling.scale * Double(scaling.rank))),
            ("dropout", .number(scaling.dropout)),
            ("keys", .array(projections.map { .string($0.key) })),
            ("layers", .array(layers.map { .integer($0) })),
            ("num_layers", .integer(modelLayers - (layers.first ?? 0))),
            ("model_layers", .integer(modelLayers)), ("tensors", .integer(tensors().count)),
            ("base_quantization", origin.baseQuantization.map { .object($0) } ?? .null),
            ("training", .object(origin.training)),
        ]
        let texts: [(String, String?)] = [
            ("format", Adapter.fileFormat), ("fine_tune_type", scaling.isDoRA ? "dora" : "lora"),
            ("base_name", origin.baseName), ("base_fingerprint", origin.baseFingerprint?.text),
            ("weights_sha256", weightsSHA256), ("package_version", Adapter.writer),
        ]
        let all = values.map { ($0.0, Optional($0.1.text(.line))) } + texts
        return all.compactMap { name, text in text.map { (name: name, text: $0) } }
    }

    /// The same numbers under PEFT's names and in its orientation, sorted.
    private func peftPieces() -> [TensorPiece] {
        let ends = [
            "lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector",
        ]
        return changes.flatMap { site, change in
            change.parts.map { part in
                TensorPiece(
                    name: "base_model.model.\(site.name).\(ends[part.name] ?? part.name)",
                    part.tensor.transposed())
            }
        }.sorted { $0.name < $1.name }
    }

    /// `adapter_config.json`: for mlx-lm and mlx-swift-lm, then for PEFT, then our own facts.
    private func folderConfig() -> JSONValue {
        let isEven = changes.count == layers.count * projections.count
        let allBlocks = layers == Array(0..<modelLayers)
        // An uneven adapter names every module in full, which needs no list of blocks.
        let targets =
            isEven
            ? projections.map { String($0.key.split(separator: ".").last ?? "") }.sorted()
            : sites.map(\.name)
        let alpha = scaling.scale * Double(scaling.rank)
        return [
            "fine_tune_type": .string(scaling.isDoRA ? "dora" : "lora"),
            "num_layers": .integer(modelLayers - (layers.first ?? 0)),
            "lora_parameters": [
                "rank": .integer(scaling.rank), "scale": .number(scaling.scale),
                "dropout": .number(scaling.dropout),
                "keys": .array(projections.map { .string($0.key) }),
            ],
            "peft_type": "LORA", "task_type": "CAUSAL_LM",
            "base_model_name_or_path": origin.baseName.map { .string($0) } ?? .null,
            "r": .integer(scaling.rank), "lora_alpha": .number(alpha),
            "lora_dropout": .number(scaling.dropout),
            "target_modules": .array(targets.map { .string($0) }),
            "layers_to_transform": !isEven || allBlocks
                ? .null : .array(layers.map { .integer($0) }),
            "bias": "none", "fan_in_fan_out": .bool(false), "inference_mode": .bool(true),
            "init_lora_weights": .bool(true), "modules_to_save": .null,
            "rank_pattern": .object(JSONObject()), "alpha_pattern": .object(JSONObject()),
            "use_dora": .bool(scaling.isDoRA), "use_rslora": .bool(false),
            "medphi": [
                "base_name": origin.baseName.map { .string($0) } ?? .null,
                "base_fingerprint": origin.baseFingerprint.map { .string($0.text) } ?? .null,
                "base_quantization": origin.baseQuantization.map { .object($0) } ?? .null,
                "package_version": .string(Adapter.writer), "training": .object(origin.training),
                "weights_sha256": .string(weightsSHA256),
            ],
        ]
    }

    /// Refuses to write over anything but an adapter file.
    private static func checkFile(_ url: URL, _ replace: Bool) throws {
        guard FileBytes.exists(url.path) else { return }
        let format = (try? SafetensorsFile(url))?.header.metadata["format"]
        guard format == fileFormat else {
            throw Phi3Error.notWritten(
                path: url.path, reason: "something else than an adapter is there")
        }
        if !replace {
            throw Phi3Error.notWritten(path: url.path, reason: "it holds an adapter already")
        }
    }

    /// Refuses to replace anything but an adapter's folder; true where there is a folder.
    private static func checkFolder(_ url: URL, _ replace: Bool) throws -> Bool {
        guard FileBytes.exists(url.path) else { return false }
        let names = try? FileManager.default.contentsOfDirectory(atPath: url.path)
        guard let names, Set(names).subtracting([".DS_Store"]).isSubset(of: replaceable) else {
            throw Phi3Error.notWritten(
                path: url.path, reason: "something else than an adapter is there")
        }
        if !replace, names.contains(configName) {
            throw Phi3Error.notWritten(path: url.path, reason: "it holds an adapter already")
        }
        return true
    }
}

extension Tensor {
    /// A matrix with columns of zeros at the end, up to some number of columns.
    func padded(columns: Int) -> Tensor {
        shape[1] >= columns ? self : transposed().padded(rows: columns).transposed()
    }

    /// A matrix with rows of zeros at the end, up to some number of rows.
    func padded(rows: Int) -> Tensor {
        guard shape[0] < rows else { return self }
        let zeros = Data(count: (rows - shape[0]) * shape[1] * type.size)
        return Tensor(type: type, shape: [rows, shape[1]], data: Data(data) + zeros)
    }
}

extension Adapter {
    /// The same adapter for a model that knows more about itself than the file does.
    ///
    /// - Parameters:
    ///   - layerCount: blocks of the model.
    ///   - base: what is known of the base; it fills what the file does not say.
    public func described(layerCount: Int, base: Origin) -> Adapter {
        var origin = origin
        origin.baseName = origin.baseName ?? base.baseName
        if origin.baseFingerprint == nil {
            origin.baseFingerprint = base.baseFingerprint
            origin.baseQuantization = base.baseQuantization
        }
        return Adapter(
            url: url, changes: changes, scaling: scaling, modelLayers: layerCount, origin: origin,
            form: form)
    }
}
