import Foundation

/// A checked checkpoint: a folder with `config.json` and safetensors, whole or in shards, plain or
/// quantised by MLX, or a single file whose metadata holds the text of its `config.json`.
///
/// Every tensor is compared with the configuration before any is read; the bytes stay mapped.
public struct Checkpoint: Sendable {
    /// Where one tensor lies.
    public struct Stored: Sendable {
        /// The place of its file among `files`.
        let file: Int
        /// What the header says of it.
        public let info: TensorInfo
    }

    /// The folder or the single file.
    public let url: URL
    /// The architecture.
    public let config: ModelConfig
    /// `config.json` as text, as it was written.
    public let configText: String
    /// The tensors the model uses, by name.
    public let tensors: [String: Stored]
    /// The weight files, sorted by name.
    let files: [SafetensorsFile]

    /// The entry of a single file's metadata that holds its `config.json`.
    static let configKey = "config"

    /// Whether the model is one file.
    public var isSingleFile: Bool { url.pathExtension == "safetensors" }
    /// Where the tokenizer lies.
    public var folder: URL { isSingleFile ? url.deletingLastPathComponent() : url }
    /// The metadata of the weight file; of several, of the first.
    public var metadata: [String: String] { files.first?.header.metadata ?? [:] }
    /// Bytes of all tensors the model uses.
    public var byteCount: Int { tensors.values.reduce(0) { $0 + $1.info.range.count } }

    /// The form of each quantised layer.
    public var quantizedLayers: [String: AffineQuantization.Form] {
        config.quantizedLayers(tensors.mapValues(\.info))
    }

    /// A tensor's bytes, still mapped; `nil` for a name that the model does not use.
    public func tensor(_ name: String) -> Tensor? {
        tensors[name].flatMap { files[$0.file].tensor(name) }
    }

    /// Every tensor that the model uses, in the order of the files and of their bytes.
    public func storedTensors() -> [(name: String, tensor: Tensor)] {
        files.flatMap { file in
            file.header.namesByPlace.compactMap { name in
                guard tensors[name] != nil, let tensor = file.tensor(name) else { return nil }
                return (name: name, tensor: tensor)
            }
        }
    }

    /// Finds and checks a checkpoint.
    ///
    /// - Parameter url: a folder, or a single-file model.
    /// - Throws: `Phi3Error`: anything missing, damaged, or not what `config.json` says.
    public static func open(_ url: URL) throws -> Checkpoint {
        switch FileBytes.kind(of: url) {
        case .folder: return try openFolder(url)
        case .file where url.pathExtension == "safetensors": return try openFile(url)
        case .file:
            throw Phi3Error.checkpoint(
                url.path, "is not a .safetensors file", expected: "a model folder or such a file",
                advice: "Give the folder of the model.")
        default:
            throw Phi3Error.unreadable(path: url.path, reason: FileBytes.kind(of: url).reason)
        }
    }

    private static func openFolder(_ folder: URL) throws -> Checkpoint {
        let place = folder.appendingPathComponent("config.json")
        let adapter = folder.appendingPathComponent("adapter_config.json")
        if FileBytes.kind(of: adapter) == .file, FileBytes.kind(of: place) == .missing {
            throw Phi3Error.checkpoint(
                folder.path, "holds an adapter", expected: "a model",
                advice: "Load its base as the model and apply this folder as the adapter.")
        }
        let data = try FileBytes.read(place, limit: FileBytes.jsonLimit)
        let raw = try FileBytes.json(data, of: place)
        let files = try Shards.files(in: folder)
        let text = String(decoding: data, as: UTF8.self)
        return try Checkpoint(url: folder, raw: raw, text: text, place: place.path, files: files)
    }

    private static func openFile(_ url: URL) throws -> Checkpoint {
        let file = try SafetensorsFile(url)
        guard let text = file.header.metadata[configKey] else {
            throw Phi3Error.checkpoint(
                url.path, "its metadata holds no '\(configKey)'",
                expected: "a file that describes a model by itself",
                advice: "Give the folder it lies in.")
        }
        let place = "\(url.path), metadata '\(configKey)'"
        guard let raw = try? JSONValue(parsing: text) else {
            throw Phi3Error.checkpoint(
                place, "is not valid JSON", expected: "the text of a config.json",
                advice: "Fetch or write the file again.")
        }
        return try Checkpoint(url: url, raw: raw, text: text, place: place, files: [file])
    }

    private init(
        url: URL, raw: JSONValue, text: String, place: String, files: [SafetensorsFile]
    ) throws {
        config = try ModelConfig.fromHF(raw, place: place)
        self.url = url
        configText = text
        self.files = files
        var tensors: [String: Stored] = [:]
        for (index, file) in files.enumerated() {
            for (name, info) in file.header.tensors where Checkpoint.isUsed(name, config) {
                tensors[name] = Stored(file: index, info: info)
            }
        }
        self.tensors = tensors
        try check()
    }

    private static func isUsed(_ name: String, _ config: ModelConfig) -> Bool {
        // Old exports store what config.json already says.
        if name.hasSuffix("rotary_emb.inv_freq") { return false }
        return !(config.tiesEmbeddings && name.hasPrefix("lm_head."))
    }

    private func check() throws {
        // A number alone must not decide how long the list of expected tensors is.
        guard config.layerCount <= tensors.count else {
            throw Phi3Error.checkpoint(
                url.path,
                "num_hidden_layers is \(config.layerCount), the weights are "
                    + counted(tensors.count, "tensor"), expected: "six tensors in each block",
                advice: "Fetch config.json and weights of one model.")
        }
        let expected = config.expectedTensors(tensors.mapValues(\.info))
        var problems: [String] = []
        for (name, form) in expected where tensors[name] == nil {
            problems.append("\(name): missing, expected \(form.description)")
        }
        for (name, stored) in tensors {
            let form = expected[name]
            let info = stored.info
            if let form, form.shape == info.shape, form.types.contains(info.type) { continue }
            let found = "\(Layout.shown(info.shape)) \(info.type.rawValue)"
            problems.append(
                "\(printable(name)): found \(found), expected \(form?.description ?? "no such tensor")"
            )
        }
        if !problems.isEmpty {
            throw Phi3Error.checkpoint(
                url.path,
                "does not fit its config.json (\(counted(problems.count, "tensor"))): "
                    + capped(problems), expected: "the tensors of one model",
                advice: "Fetch config.json and weights of one model.")
        }
    }
}

/// The weight files of a folder.
enum Shards {
    static let single = "model.safetensors", index = "model.safetensors.index.json"

    static func files(in folder: URL) throws -> [SafetensorsFile] {
        let index = folder.appendingPathComponent(Shards.index)
        if FileBytes.kind(of: index) == .file { return try listed(in: folder, by: index) }
        let single = folder.appendingPathComponent(Shards.single)
        guard FileBytes.kind(of: single) == .file else {
            throw Phi3Error.checkpoint(
                folder.path, "neither \(Shards.single) nor \(Shards.index) is here",
                expected: "weights as safetensors", advice: "Fetch the weights again.")
        }
        return [try SafetensorsFile(single)]
    }

    private static func listed(in folder: URL, by index: URL) throws -> [SafetensorsFile] {
        func problem(_ found: String, _ expected: String) -> Phi3Error {
            .checkpoint(
                index.path, found, expected: expected, advice: "Fetch or write the weights again.")
        }
        guard let map = try FileBytes.json(index)["weight_map"]?.object, !map.isEmpty else {
            throw problem("it holds no 'weight_map'", "a map from tensor names to files")
        }
        var names: [String: Set<String>] = [:]
        for (tensor, value) in map {
            // A name with a path in it could point anywhere on this machine.
            guard let name = value.string, name.hasSuffix(".safetensors"),
                !name.unicodeScalars.contains(where: { "/\\:\0".unicodeScalars.contains($0) })
            else { throw problem("a shard is \(value.shown)", "a .safetensors file beside it") }
            names[name, default: []].insert(tensor)
        }
        var files: [SafetensorsFile] = []
        for (name, tensors) in names.sorted(by: { $0.key < $1.key }) {
            let file = try SafetensorsFile(folder.appendingPathComponent(name))
            let differ = tensors.symmetricDifference(file.header.tensors.keys)
            guard differ.isEmpty else {
                throw problem(
                    "it and \(name) differ about \(capped(differ.map { printable($0) }))",
                    "agreement")
            }
            files.append(file)
        }
        return files
    }
}
