/// What an adapter is to be put on, as far as checking it needs to know.
public struct AdapterTarget: Sendable {
    /// Blocks of the model.
    public var layerCount: Int
    /// (outputs, inputs) of each projection.
    var shapes: [Projection: (outputs: Int, inputs: Int)]
    /// Which base the weights are.
    public var fingerprint: Fingerprint
    /// The form that an export gave to plain weights, group 0 for one scale per row; `nil` where the
    /// checkpoint's own numbers are used.
    public var quantizedOnExport: AffineQuantization.Form?
    /// The rank of the slots that the adapter must fit; `nil` without slots.
    public var slotRank: Int?
    /// SHA-256 of the tokenizer; `nil`: not known.
    public var tokenizerSHA256: String?
    /// SHA-256 of the chat template; `nil`: not known.
    public var chatTemplateSHA256: String?

    /// A checkpoint on this machine.
    public init(_ checkpoint: Checkpoint, fingerprint: Fingerprint) {
        layerCount = checkpoint.config.layerCount
        shapes = [:]
        for projection in Projection.allCases {
            shapes[projection] = checkpoint.config.shape(of: projection)
        }
        self.fingerprint = fingerprint
    }

    /// An exported bundle.
    public init(_ manifest: Manifest) {
        let model = manifest.medphi.model
        let quantization = manifest.medphi.quantization
        // The manifest is not trusted: what overflows cannot equal a real shape.
        let query = model.heads &* model.headSize
        let key = model.kvHeads &* model.headSize
        layerCount = model.layers
        shapes = [
            .qkv: (query &+ 2 &* key, model.hiddenSize), .o: (model.hiddenSize, query),
            .gateUp: (2 &* model.intermediateSize, model.hiddenSize),
            .down: (model.hiddenSize, model.intermediateSize),
        ]
        fingerprint = manifest.medphi.baseFingerprint
        if quantization.source == .exported {
            quantizedOnExport = AffineQuantization.Form(
                bits: quantization.bits, groupSize: quantization.group ?? 0)
        }
        slotRank = manifest.medphi.adapters.rankSlot
        tokenizerSHA256 = manifest.medphi.tokenizer.sha256
        chatTemplateSHA256 = manifest.medphi.tokenizer.chatTemplateSHA256
    }
}

/// What is accepted that the checks would otherwise refuse.
public struct AdapterOptions: Sendable, Equatable {
    /// Accept an adapter that does not say which base it belongs to, as PEFT's never do.
    public var allowsUnstatedBase: Bool
    /// Accept an adapter that says it belongs to another base of the same shape.
    public var allowsOtherBase: Bool

    /// Nothing is accepted unless it is asked for.
    public init(allowsUnstatedBase: Bool = false, allowsOtherBase: Bool = false) {
        self.allowsUnstatedBase = allowsUnstatedBase
        self.allowsOtherBase = allowsOtherBase
    }
}

extension Adapter {
    /// Everything that speaks against putting this adapter on a model; empty: nothing.
    ///
    /// - Parameters:
    ///   - target: the model.
    ///   - options: what is accepted nevertheless.
    public func problems(
        on target: AdapterTarget, options: AdapterOptions = AdapterOptions()
    ) -> [String] {
        shapeProblems(target) + slotProblems(target) + baseProblems(target, options)
            + textProblems(target)
    }

    private func shapeProblems(_ target: AdapterTarget) -> [String] {
        var lines: [String] = []
        for (site, change) in changes {
            guard site.layer < target.layerCount, let shape = target.shapes[site.projection] else {
                lines.append(
                    "\(site.name): this model has blocks 0 to \(target.layerCount - 1) only")
                continue
            }
            let expected = [
                "lora_a": [shape.inputs, change.rank], "lora_b": [change.rank, shape.outputs],
                "m": [shape.outputs],
            ]
            for (name, tensor) in change.parts where tensor.shape != expected[name] {
                lines.append(
                    "\(site.name).\(name): shape \(Layout.shown(tensor.shape)), model expects "
                        + Layout.shown(expected[name] ?? []))
            }
        }
        return lines
    }

    private func slotProblems(_ target: AdapterTarget) -> [String] {
        guard let slot = target.slotRank else { return [] }
        var lines: [String] = []
        if scaling.isDoRA {
            lines.append(
                "DoRA rescales rows of the base, which no pair of factors beside it can do; "
                    + "fold it in (mlx_medphi export --adapters fused)")
        }
        if scaling.rank > slot {
            lines.append(
                "rank is \(scaling.rank), the slots have \(slot): export with "
                    + "slot rank \(scaling.rank)")
        }
        for (site, change) in changes {
            for (name, tensor, scale) in [
                ("lora_a", change.a, 1), ("lora_b", change.b, Float(scaling.scale)),
            ] {
                let largest = tensor.floats().reduce(Float(0)) { max($0, abs($1 * scale)) }
                if !(largest < HalfFloat.largest) {
                    lines.append(
                        "\(site.name).\(name): its largest value, scaled, is \(largest), "
                            + "half precision holds less than \(HalfFloat.largest)")
                }
            }
        }
        return lines
    }

    private func baseProblems(_ target: AdapterTarget, _ options: AdapterOptions) -> [String] {
        if options.allowsOtherBase { return [] }
        guard let theirs = origin.baseFingerprint else {
            return options.allowsUnstatedBase
                ? []
                : [
                    "does not say which base it was trained on; if it is this one, allow an unstated base"
                ]
        }
        if theirs == target.fingerprint { return [] }
        guard let trained = theirs.quantized(from: target.fingerprint) else {
            return [
                "base fingerprint: \(theirs.short), this model has \(target.fingerprint.short): load "
                    + "\(origin.baseName ?? "the base it was trained on")"
            ]
        }
        if trained == target.quantizedOnExport { return [] }
        let here = target.quantizedOnExport.map { Adapter.shown($0) } ?? "the plain weights"
        return [
            "was trained on this base with \(Adapter.shown(trained)), this model has \(here)"
        ]
    }

    private static func shown(_ form: AffineQuantization.Form) -> String {
        "\(form.bits) bits " + (form.groupSize > 0 ? "in groups of \(form.groupSize)" : "per row")
    }

    private func textProblems(_ target: AdapterTarget) -> [String] {
        let pairs = [
            ("tokenizer", origin.tokenizerSHA256, target.tokenizerSHA256),
            ("chat template", origin.chatTemplateSHA256, target.chatTemplateSHA256),
        ]
        return pairs.compactMap { name, theirs, ours in
            guard let theirs, let ours, theirs != ours else { return nil }
            return "\(name): it goes with \(Fingerprint(theirs).short), this model has "
                + Fingerprint(ours).short
        }
    }
}
