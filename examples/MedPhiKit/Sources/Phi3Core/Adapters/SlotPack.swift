import Foundation

/// The slot pack: an adapter in the form that a package with adapter slots takes at run time.
///
/// One file holds eight half-precision tensors: `loraA_m` (layers, rank, in) and `loraB_m` (layers,
/// out, rank), with m one of qkv, o, gate_up and down. The scale is folded into B; layers without a
/// change are zeros, and so is what fills the rank up to the slot's.
enum SlotPack {
    static let kind = "medphi-slots-"
    static let format = "medphi-slots-1"

    private static let facts = [
        "base_fingerprint_stated", "base_id", "base_quantization", "chat_template_sha256",
        "dropout", "dtype", "format", "layers", "modules", "name", "package_version", "rank",
        "rank_slot", "scale_folded", "source_format", "tensors_sha256", "tokenizer_sha256",
        "training",
    ]
    private static let jsonFacts = [
        "base_fingerprint_stated", "base_quantization", "dropout", "layers", "modules", "rank",
        "rank_slot", "scale_folded", "training",
    ]

    /// The names of a projection's two slots.
    static func names(_ projection: Projection) -> (a: String, b: String) {
        ("loraA_\(projection.module)", "loraB_\(projection.module)")
    }

    /// Reads a pack and checks all of it.
    static func read(_ file: SafetensorsFile) throws -> AdapterReading {
        let found = file.header.metadata["format"] ?? ""
        guard found == format else {
            throw Phi3Error.unsupportedSchema(
                ErrorDetails(
                    place: file.url.path, found: "slot pack of format '\(printable(found))'",
                    expected: "'\(format)'",
                    advice: "Update this package, or export the pack again."))
        }
        let problems = AdapterProblems()
        var adapter: Adapter?
        if checkShapes(file.header, problems) {
            adapter = described(file, problems)
        }
        return AdapterReading(
            adapter: adapter, problems: problems.lines, what: "is not a whole slot pack",
            advice: "Copy or export it again.")
    }

    /// What the header alone shows; true where all shapes belong to one model and one slot.
    private static func checkShapes(
        _ header: SafetensorsHeader, _ problems: AdapterProblems
    ) -> Bool {
        let tensors = header.tensors
        let pairs = Projection.allCases.map { names($0) }
        let known = Set(pairs.flatMap { [$0.a, $0.b] })
        for name in known where tensors[name] == nil { problems.add("\(name): missing") }
        for (name, info) in tensors {
            if !known.contains(name) {
                problems.add("\(printable(name)): is no slot")
            } else if info.type != .f16 || info.shape.count != 3 || info.shape.contains(0) {
                problems.add(
                    "\(name): \(info.type.rawValue) of shape \(Layout.shown(info.shape)), "
                        + "expected F16 of three extents")
            }
        }
        guard problems.lines.isEmpty, let first = tensors["loraA_qkv"]?.shape else { return false }
        let layers = first[0]
        let rank = first[1]
        let hidden = first[2]
        if layers > ModelConfig.mostLayers {
            problems.add("\(layers) layers, no Phi-3 has more than \(ModelConfig.mostLayers)")
        }
        for projection in Projection.allCases {
            let (a, b) = names(projection)
            guard let one = tensors[a]?.shape, let two = tensors[b]?.shape else { return false }
            // The inputs of two projections and the outputs of the others are the model's width.
            let wide = projection == .qkv || projection == .gateUp
            let expected = (
                a: [layers, rank, wide ? hidden : one[2]],
                b: [layers, wide ? two[1] : hidden, rank]
            )
            for (name, shape, wanted) in [(a, one, expected.a), (b, two, expected.b)]
            where shape != wanted {
                problems.add(
                    "\(name): shape \(Layout.shown(shape)), the other slots ask for "
                        + Layout.shown(wanted))
            }
        }
        return problems.lines.isEmpty
    }

    private static func described(_ file: SafetensorsFile, _ problems: AdapterProblems) -> Adapter?
    {
        let metadata = file.header.metadata
        for name in facts where metadata[name] == nil {
            problems.add("\(name): missing in the metadata")
        }
        var parsed: [String: JSONValue] = [:]
        for name in jsonFacts {
            parsed[name] = metadata[name].flatMap { try? JSONValue(parsing: $0) }
            if parsed[name] == nil { problems.add("\(name): malformed in the metadata") }
        }
        guard problems.lines.isEmpty else { return nil }
        checkFacts(parsed, metadata, problems)
        let stated = problems.checkScaling(
            rank: parsed["rank"], scale: .integer(1), dropout: parsed["dropout"])
        guard let (rank, _, dropout) = stated else { return nil }
        let changes = changes(file, rank, problems)
        checkTensors(file, changes, parsed, rank, problems)
        var origin = Adapter.Origin(
            baseName: metadata["base_id"],
            baseFingerprint: metadata["base_fingerprint"].map { Fingerprint($0) },
            baseQuantization: parsed["base_quantization"]?.object)
        origin.packageVersion = metadata["package_version"]
        origin.training = parsed["training"]?.object ?? JSONObject()
        origin.tokenizerSHA256 = metadata["tokenizer_sha256"]
        origin.chatTemplateSHA256 = metadata["chat_template_sha256"]
        return Adapter(
            url: file.url, changes: changes,
            scaling: Adapter.Scaling(rank: rank, scale: 1, isDoRA: false, dropout: dropout),
            modelLayers: file.header.tensors["loraA_qkv"]?.shape[0] ?? 0,
            origin: origin, form: .slotPack)
    }

    /// Values of the metadata that no pack has.
    private static func checkFacts(
        _ parsed: [String: JSONValue], _ metadata: [String: String], _ problems: AdapterProblems
    ) {
        func text(_ name: String) -> String { metadata[name] ?? "" }
        let quantization = parsed["base_quantization"]
        let possible: [(String, Bool)] = [
            (
                "base_fingerprint",
                metadata["base_fingerprint"].map { Fingerprint($0).isPossible } ?? true
            ),
            ("base_fingerprint_stated", parsed["base_fingerprint_stated"]?.bool != nil),
            ("base_quantization", quantization?.isNull == true || quantization?.object != nil),
            ("chat_template_sha256", isSHA256(text("chat_template_sha256"))),
            ("dtype", text("dtype") == "F16"),
            ("scale_folded", parsed["scale_folded"]?.bool == true),
            ("source_format", Adapter.Form(rawValue: text("source_format")) != nil),
            ("tokenizer_sha256", isSHA256(text("tokenizer_sha256"))),
            ("training", parsed["training"]?.object != nil),
        ]
        for (name, fits) in possible where !fits {
            problems.add("\(name): '\(printable(text(name), limit: 40))' is not possible")
        }
    }

    /// The changes of a pack in its own rank; what lies above it must be zero.
    private static func changes(
        _ file: SafetensorsFile, _ rank: Int, _ problems: AdapterProblems
    ) -> [ProjectionSite: LowRank] {
        var changes: [ProjectionSite: LowRank] = [:]
        for projection in Projection.allCases {
            let (a, b) = names(projection)
            guard let one = file.tensor(a), let two = file.tensor(b) else { continue }
            for (name, tensor) in [(a, one), (b, two)] where !tensor.isFinite {
                problems.add("\(name): holds values that are not finite")
            }
            let slot = one.shape[1]
            guard rank <= slot else {
                problems.add("rank is \(rank), its slots have \(slot)")
                return [:]
            }
            var isClean = true
            for layer in 0..<one.shape[0] {
                let rows = one.matrix(layer)
                let columns = two.matrix(layer).transposed()
                if rows.isZero, columns.isZero { continue }
                isClean =
                    isClean && rows.rows(rank..<slot).isZero && columns.rows(rank..<slot).isZero
                changes[ProjectionSite(layer: layer, projection: projection)] = LowRank(
                    a: rows.rows(0..<rank).transposed(), b: columns.rows(0..<rank), m: nil)
            }
            if !isClean { problems.add("\(projection.module): values above its rank of \(rank)") }
        }
        if changes.isEmpty { problems.add("holds only zeros, so there is no adapter in it") }
        return changes
    }

    /// The facts that follow from the tensors are not believed but made again.
    private static func checkTensors(
        _ file: SafetensorsFile, _ changes: [ProjectionSite: LowRank],
        _ parsed: [String: JSONValue],
        _ rank: Int, _ problems: AdapterProblems
    ) {
        let layers = Set(changes.keys.map(\.layer)).sorted().map { JSONValue.integer($0) }
        let modules = Set(changes.keys.map(\.projection)).sorted().map {
            JSONValue.string($0.module)
        }
        let slot = file.header.tensors["loraA_qkv"]?.shape[1] ?? 0
        let made: [(String, JSONValue)] = [
            ("layers", .array(layers)), ("modules", .array(modules)), ("rank_slot", .integer(slot)),
        ]
        for (name, value) in made where parsed[name] != value {
            problems.add("\(name): its metadata and its tensors say different things")
        }
        var hash = SHA256()
        for name in file.header.tensors.keys.sorted() {
            if let tensor = file.tensor(name) { hash.update(tensor.data) }
        }
        if hash.hexDigest() != file.header.metadata["tensors_sha256"] {
            problems.add("its values are not those it was written with: the file is damaged")
        }
    }
}

extension Tensor {
    /// One matrix of a stack of them; the caller has checked that there is one.
    func matrix(_ index: Int) -> Tensor {
        let size = shape[1] * shape[2] * type.size
        let begin = data.startIndex + index * size
        return Tensor(type: type, shape: [shape[1], shape[2]], data: data[begin..<begin + size])
    }

    /// Some rows of a matrix.
    func rows(_ range: Range<Int>) -> Tensor {
        let width = shape[1] * type.size
        let begin = data.startIndex + range.lowerBound * width
        return Tensor(
            type: type, shape: [range.count, shape[1]],
            data: data[begin..<begin + range.count * width])
    }
}
