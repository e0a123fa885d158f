import Foundation

/// An adapter as far as it could be read, and what is wrong with it.
struct AdapterReading {
    var adapter: Adapter?
    var problems: [String]
    var what: String
    var advice: String
}

extension Adapter {
    static let configName = "adapter_config.json"
    static let mlxName = "adapters.safetensors"
    static let peftName = "adapter_model.safetensors"
    static let fileFormat = "medphi-adapter"
    static let fileVersion = 1

    /// Reads an adapter and checks everything that can be checked without its base.
    ///
    /// - Parameters:
    ///   - url: the single file that training writes, a slot pack, or a folder of mlx-lm, of PEFT, or
    ///     of both.
    ///   - base: its base; only a PEFT adapter that leaves out a part of a fused projection needs it.
    /// - Throws: `Phi3Error`: missing, damaged or inconsistent; all that is wrong is in one error.
    public static func read(_ url: URL, base: Checkpoint? = nil) throws -> Adapter {
        let reading = try reading(url, base: base)
        guard reading.problems.isEmpty, let adapter = reading.adapter else {
            throw refused(url, reading.what, reading.problems, advice: reading.advice)
        }
        return adapter
    }

    /// Reads as far as that goes.
    static func reading(_ url: URL, base: Checkpoint?) throws -> AdapterReading {
        switch FileBytes.kind(of: url) {
        case .file: return try readingFile(url)
        case .folder: break
        default: throw Phi3Error.unreadable(path: url.path, reason: "no such file or folder")
        }
        let place = url.appendingPathComponent(configName)
        guard FileBytes.kind(of: place) == .file else {
            throw Phi3Error.damaged(
                path: url.path, what: "holds no \(configName)", expected: "an adapter's folder",
                advice: "Give the folder that holds the adapter itself.")
        }
        guard let config = try FileBytes.json(place).object else {
            throw Phi3Error.damaged(
                path: place.path, what: "not a JSON object", advice: "Write the adapter again.")
        }
        let forMLX = config["lora_parameters"] != nil || config["fine_tune_type"] != nil
        let forPEFT = config["peft_type"] != nil
        let weights = url.appendingPathComponent(mlxName)
        let copy = url.appendingPathComponent(peftName)
        if forMLX, FileBytes.kind(of: weights) == .file {
            let isBoth = forPEFT && FileBytes.kind(of: copy) == .file
            // The copy for PEFT is not read, but a cut one shows that the writing was cut.
            if isBoth { _ = try SafetensorsFile(copy) }
            return try MLXAdapter.read(url, config, form: isBoth ? .both : .mlx)
        }
        if forPEFT { return try PEFTAdapter.read(url, config, base) }
        throw Phi3Error.damaged(
            path: place.path,
            what: forMLX ? "\(mlxName) is not there" : "neither mlx-lm's nor PEFT's",
            expected: "an adapter's folder", advice: "Save the adapter again.")
    }

    private static func readingFile(_ url: URL) throws -> AdapterReading {
        let file = try SafetensorsFile(url)
        let format = file.header.metadata["format"] ?? ""
        if format.hasPrefix(SlotPack.kind) { return try SlotPack.read(file) }
        guard format == fileFormat else {
            throw Phi3Error.damaged(
                path: url.path,
                what: "its metadata does not say rank and scale (format "
                    + "'\(printable(format))')", expected: "'\(fileFormat)' or a slot pack",
                advice: "Give the adapter's folder, or save the adapter again.")
        }
        let problems = AdapterProblems()
        let tensors = checkedTensors(file, problems)
        return try DescribedAdapter.read(file, tensors, problems, form: .file)
    }

    /// The tensors of a file; what is wrong with single ones is added to `problems`.
    static func checkedTensors(
        _ file: SafetensorsFile, _ problems: AdapterProblems
    ) -> [String: Tensor] {
        var tensors: [String: Tensor] = [:]
        for name in file.header.tensors.keys {
            guard let tensor = file.tensor(name) else { continue }
            if !tensor.type.isWeight {
                problems.add(
                    "\(printable(name)): dtype \(tensor.type.rawValue), expected one of F32, F16, BF16"
                )
            } else if !tensor.isFinite {
                problems.add("\(printable(name)): holds values that are not finite")
            } else {
                tensors[name] = tensor
            }
        }
        return tensors
    }

    /// A block's number at the front of a text: `0` or up to four digits without a leading zero.
    static func layerNumber(_ text: some StringProtocol) -> Int? {
        let digits = Array(text.utf8)
        guard (1...4).contains(digits.count), digits.allSatisfy({ (0x30...0x39).contains($0) }),
            digits[0] != 0x30 || digits.count == 1
        else { return nil }
        return Int(String(decoding: digits, as: UTF8.self))
    }
}

/// Loose tensors put together to changes.
struct AdapterParts {
    var a: Tensor?
    var b: Tensor?
    var m: Tensor?

    /// A whole change; what is missing or has another rank goes to `problems`.
    func assembled(
        _ name: String, rank: Int, isDoRA: Bool, _ problems: AdapterProblems
    ) -> LowRank? {
        var missing: [String] = []
        if a == nil { missing.append("lora_a") }
        if b == nil { missing.append("lora_b") }
        if isDoRA, m == nil { missing.append("m") }
        for part in missing { problems.add("\(name).\(part): missing") }
        if !isDoRA, m != nil {
            problems.add("\(name).m: a DoRA magnitude, though the configuration says LoRA")
        }
        guard missing.isEmpty, let a, let b else { return nil }
        let before = problems.lines.count
        if a.shape.count != 2 || a.shape[1] != rank {
            problems.add("\(name).lora_a: shape \(Layout.shown(a.shape)), expected (in, \(rank))")
        }
        if b.shape.count != 2 || b.shape[0] != rank {
            problems.add("\(name).lora_b: shape \(Layout.shown(b.shape)), expected (\(rank), out)")
        } else if let m, m.shape != [b.shape[1]] {
            problems.add("\(name).m: shape \(Layout.shown(m.shape)), expected (\(b.shape[1]),)")
        }
        return problems.lines.count == before ? LowRank(a: a, b: b, m: isDoRA ? m : nil) : nil
    }

    /// Tensors by site under mlx-lm's names; unknown ones go to `problems`.
    static func sorted(
        _ tensors: [String: Tensor], _ problems: AdapterProblems
    ) -> [ProjectionSite: AdapterParts] {
        var parts: [ProjectionSite: AdapterParts] = [:]
        for (name, tensor) in tensors {
            let pieces = name.split(separator: ".", omittingEmptySubsequences: false)
            guard pieces.count == 6, pieces[0] == "model", pieces[1] == "layers",
                let layer = Adapter.layerNumber(pieces[2]),
                let projection = Projection(key: "\(pieces[3]).\(pieces[4])"),
                ["lora_a", "lora_b", "m"].contains(pieces[5])
            else {
                problems.add(unknown(name))
                continue
            }
            let site = ProjectionSite(layer: layer, projection: projection)
            switch pieces[5] {
            case "lora_a": parts[site, default: AdapterParts()].a = tensor
            case "lora_b": parts[site, default: AdapterParts()].b = tensor
            default: parts[site, default: AdapterParts()].m = tensor
            }
        }
        return parts
    }

    /// The line for a tensor that belongs to no projection of Phi-3.
    static func unknown(_ name: String) -> String {
        let known = Projection.allCases.map(\.key).joined(separator: ", ")
        return
            "\(printable(name, limit: 120)): not a change of one of Phi-3's projections (\(known))"
    }

    /// Projections that some of `layers` have and others lack: a part was lost.
    static func uneven(
        _ sites: some Sequence<ProjectionSite>, _ layers: some Sequence<Int>,
        _ problems: AdapterProblems
    ) {
        let present = Set(sites)
        let projections = Set(present.map(\.projection))
        for layer in layers {
            for projection in projections {
                let site = ProjectionSite(layer: layer, projection: projection)
                if !present.contains(site) {
                    problems.add("\(site.name): missing, other layers have it")
                }
            }
        }
    }
}
