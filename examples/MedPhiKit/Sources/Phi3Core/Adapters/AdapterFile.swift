import Foundation

/// An adapter file that carries its own facts in its metadata.
enum DescribedAdapter {
    private static let facts = [
        "version", "rank", "scale", "dropout", "keys", "layers", "model_layers", "tensors",
        "base_quantization", "training", "alpha",
    ]

    /// Reads it as far as that goes.
    ///
    /// - Throws: `Phi3Error`: malformed metadata, a newer form, or no tensors.
    static func read(
        _ file: SafetensorsFile, _ tensors: [String: Tensor], _ problems: AdapterProblems,
        form: Adapter.Form
    ) throws -> AdapterReading {
        let metadata = file.header.metadata
        let url = file.url
        var read: [String: JSONValue] = [:]
        for name in facts {
            guard let value = metadata[name].flatMap({ try? JSONValue(parsing: $0) }) else {
                throw malformed(url, name)
            }
            read[name] = value
        }
        guard let version = read["version"]?.integer else { throw malformed(url, "version") }
        if version > Adapter.fileVersion {
            throw Phi3Error.unsupportedSchema(
                ErrorDetails(
                    place: url.path, found: "version \(version) of the adapter format",
                    expected: "version \(Adapter.fileVersion)", advice: "Update this package."))
        }
        guard let kind = metadata["fine_tune_type"], ["lora", "dora"].contains(kind) else {
            throw malformed(url, "fine_tune_type")
        }
        guard let training = read["training"]?.object else { throw malformed(url, "training") }
        let quantization = read["base_quantization"]
        guard quantization?.isNull == true || quantization?.object != nil else {
            throw malformed(url, "base_quantization")
        }
        var origin = Adapter.Origin(
            baseName: metadata["base_name"],
            baseFingerprint: metadata["base_fingerprint"].map { Fingerprint($0) },
            baseQuantization: quantization?.object)
        origin.packageVersion = metadata["package_version"]
        origin.training = training
        let adapter = try adapter(file, tensors, read, kind == "dora", origin, form, problems)
        return AdapterReading(
            adapter: adapter, problems: problems.lines, what: "is not a whole adapter",
            advice: "Copy or save it again.")
    }

    private static func malformed(_ url: URL, _ name: String) -> Phi3Error {
        .damaged(
            path: url.path, what: "its metadata is incomplete or malformed (\(name))",
            expected: "the facts of an adapter", advice: "Copy or save it again.")
    }

    private static func adapter(
        _ file: SafetensorsFile, _ tensors: [String: Tensor], _ facts: [String: JSONValue],
        _ isDoRA: Bool, _ origin: Adapter.Origin, _ form: Adapter.Form, _ problems: AdapterProblems
    ) throws -> Adapter? {
        if file.header.tensors.isEmpty { throw empty(file.url) }
        let scaling = problems.checkScaling(
            rank: facts["rank"], scale: facts["scale"], dropout: facts["dropout"])
        guard let (rank, scale, dropout) = scaling else { return nil }
        var changes: [ProjectionSite: LowRank] = [:]
        for (site, parts) in AdapterParts.sorted(tensors, problems) {
            changes[site] = parts.assembled(site.name, rank: rank, isDoRA: isDoRA, problems)
        }
        let alpha = facts["alpha"]?.double ?? 0
        let expected = scale * Double(rank)
        if abs(alpha - expected) > 1e-6 * max(abs(alpha), abs(expected)) {
            problems.add("scale is \(scale), alpha / rank is \(alpha / Double(rank))")
        }
        let blocks = facts["model_layers"]?.integer ?? 0
        let last = changes.keys.map(\.layer).max() ?? 0
        if blocks <= last || blocks > ModelConfig.mostLayers {
            problems.add(
                "model_layers is \(facts["model_layers"]?.shown ?? ""), expected a number of blocks"
            )
        }
        let count = file.header.tensors.count
        if facts["tensors"]?.integer != count {
            problems.add("\(count) tensors, its metadata says \(facts["tensors"]?.shown ?? "")")
        }
        let layers = Set(facts["layers"]?.array?.compactMap(\.integer) ?? [])
        let keys = Set(facts["keys"]?.array?.compactMap(\.string) ?? [])
        if !changes.keys.allSatisfy({
            layers.contains($0.layer) && keys.contains($0.projection.key)
        }) {
            problems.add("tensors of layers or keys that its metadata does not name")
        }
        let found = Adapter(
            url: file.url, changes: changes,
            scaling: Adapter.Scaling(rank: rank, scale: scale, isDoRA: isDoRA, dropout: dropout),
            modelLayers: blocks, origin: origin, form: form)
        if problems.lines.isEmpty, found.weightsSHA256 != file.header.metadata["weights_sha256"] {
            problems.add("its values are not those it was written with: the file is damaged")
        }
        return found
    }

    static func empty(_ url: URL) -> Phi3Error {
        .damaged(
            path: url.path, what: "holds no tensors", expected: "an adapter",
            advice: "Copy or save it again.")
    }
}

/// mlx-lm's folder: `adapters.safetensors` beside `adapter_config.json`.
enum MLXAdapter {
    static func read(
        _ url: URL, _ config: JSONObject, form: Adapter.Form
    ) throws -> AdapterReading {
        let kind = config["fine_tune_type"] ?? "lora"
        guard let name = kind.string, ["lora", "dora"].contains(name),
            let settings = config["lora_parameters"]?.object
        else {
            throw Phi3Error.damaged(
                path: url.appendingPathComponent(Adapter.configName).path,
                what: "fine_tune_type is \(kind.shown), lora_parameters "
                    + "\(config["lora_parameters"]?.shown ?? "missing")",
                expected: "'lora' or 'dora', and an object with rank and scale",
                advice: "Save the adapter again.")
        }
        let problems = AdapterProblems()
        let file = try SafetensorsFile(url.appendingPathComponent(Adapter.mlxName))
        let tensors = Adapter.checkedTensors(file, problems)
        let stated = problems.checkScaling(
            rank: settings["rank"], scale: settings["scale"], dropout: settings["dropout"])
        guard let (rank, scale, dropout) = stated else {
            return AdapterReading(
                adapter: nil, problems: problems.lines, what: "is not a usable adapter",
                advice: "Save the adapter again.")
        }
        let scaling = Adapter.Scaling(
            rank: rank, scale: scale, isDoRA: name == "dora", dropout: dropout)
        if file.header.metadata["format"] == Adapter.fileFormat {
            return try described(url, file, tensors, scaling, problems, form)
        }
        if file.header.tensors.isEmpty { throw DescribedAdapter.empty(file.url) }
        return plain(url, config, tensors, scaling, problems, form)
    }

    /// A folder whose weight file has facts of its own, which must say the same.
    private static func described(
        _ url: URL, _ file: SafetensorsFile, _ tensors: [String: Tensor],
        _ scaling: Adapter.Scaling, _ problems: AdapterProblems, _ form: Adapter.Form
    ) throws -> AdapterReading {
        var reading = try DescribedAdapter.read(file, tensors, problems, form: form)
        guard let there = reading.adapter?.scaling else { return reading }
        // A setting changed by hand would mean one thing to mlx-lm and another here.
        let pairs = [
            ("rank", "\(scaling.rank)", "\(there.rank)"),
            ("scale", "\(scaling.scale)", "\(there.scale)"),
            ("dora", "\(scaling.isDoRA)", "\(there.isDoRA)"),
        ]
        for (name, here, other) in pairs where here != other {
            reading.problems.append(
                "\(name): \(here) in \(Adapter.configName), \(other) in \(Adapter.mlxName)")
        }
        return reading
    }

    private static func plain(
        _ url: URL, _ config: JSONObject, _ tensors: [String: Tensor], _ scaling: Adapter.Scaling,
        _ problems: AdapterProblems, _ form: Adapter.Form
    ) -> AdapterReading {
        var changes: [ProjectionSite: LowRank] = [:]
        for (site, parts) in AdapterParts.sorted(tensors, problems) {
            changes[site] = parts.assembled(
                site.name, rank: scaling.rank, isDoRA: scaling.isDoRA, problems)
        }
        let layers = changes.keys.map(\.layer)
        guard let first = layers.min(), let last = layers.max() else {
            return AdapterReading(
                adapter: nil, problems: problems.lines, what: "is not a whole adapter",
                advice: "Save the adapter again.")
        }
        AdapterParts.uneven(changes.keys, first...last, problems)
        // mlx-lm adapts the last blocks, so the last one it names is the base's last.
        let adapter = Adapter(
            url: url, changes: changes, scaling: scaling, modelLayers: last + 1,
            origin: Adapter.Origin(baseName: Adapter.baseLabel(config["model"]?.string)), form: form
        )
        return AdapterReading(
            adapter: adapter, problems: problems.lines, what: "is not a whole adapter",
            advice: "Save the adapter again.")
    }
}
