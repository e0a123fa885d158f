import Foundation
import Phi3Core

extension ReferenceModel {
    /// The model with an adapter from a file or folder beside its weights.
    ///
    /// - Parameters:
    ///   - url: the single file that training writes, a slot pack, or a folder of mlx-lm or PEFT.
    ///   - options: what is accepted that would otherwise be refused.
    /// - Throws: `Phi3Error` with everything that speaks against it; the model is as it was.
    public func applyLoRA(
        _ url: URL, options: AdapterOptions = AdapterOptions()
    ) throws -> ReferenceModel {
        try checkBare()
        let adapter = try Adapter.load(url, for: target, base: checkpoint, options: options)
        return try applying(adapter, options: options)
    }

    /// The model with an adapter beside its weights; an adapter that is on it already is replaced.
    ///
    /// - Parameters:
    ///   - adapter: an adapter that was read.
    ///   - options: what is accepted that would otherwise be refused.
    public func applying(
        _ adapter: Adapter, options: AdapterOptions = AdapterOptions()
    ) throws -> ReferenceModel {
        try checkBare()
        let problems = adapter.problems(on: target, options: options)
        if !problems.isEmpty {
            throw Phi3Error.adapterIncompatible(
                ProblemList(
                    path: adapter.url.path, what: "does not fit this model", problems: problems,
                    advice: "Load the base it was trained on."))
        }
        var adapted = removingLoRA()
        for (site, change) in adapter.changes {
            let linear = adapted.blocks[site.layer][site.projection].linear
            adapted.blocks[site.layer][site.projection].change = SideChange(
                change, scale: adapter.scaling.scale, base: linear)
        }
        let origin = Adapter.Origin(
            baseName: url.lastPathComponent, baseFingerprint: fingerprint,
            baseQuantization: config.quantization?.section.object)
        adapted.adapter = adapter.described(layerCount: config.layerCount, base: origin)
        return adapted
    }

    /// The bare base. A fused model has no base any more and stays as it is.
    public func removingLoRA() -> ReferenceModel {
        if isFused { return self }
        var bare = self
        for layer in bare.blocks.indices {
            for projection in Projection.allCases { bare.blocks[layer][projection].change = nil }
        }
        bare.adapter = nil
        return bare
    }

    /// The model with its adapter folded into the weights, in single precision.
    public func fused() -> ReferenceModel {
        guard let adapter, !isFused else { return self }
        var fused = self
        for (site, change) in adapter.changes {
            let linear = blocks[site.layer][site.projection].linear
            fused.blocks[site.layer][site.projection] = Projected(
                linear: SideChange.adapted(linear, change, scale: adapter.scaling.scale))
        }
        fused.isFused = true
        return fused
    }

    /// The model with the numbers of adapter slots beside its weights, exactly as a package with
    /// slots computes it. Slots of zeros are the base.
    ///
    /// - Parameter slots: all eight, e.g. from `AdapterSlots`.
    /// - Throws: `Phi3Error` where a slot is missing or has another shape.
    public func applying(slots: [String: (shape: [Int], values: [Float])]) throws -> ReferenceModel
    {
        try checkBare()
        var adapted = removingLoRA()
        for projection in Projection.allCases {
            let shape = config.shape(of: projection)
            guard let a = slots["loraA_\(projection.module)"],
                let b = slots["loraB_\(projection.module)"],
                a.shape.count == 3, b.shape.count == 3, a.shape[0] == config.layerCount,
                b.shape[0] == config.layerCount, a.shape[2] == shape.inputs,
                b.shape[1] == shape.outputs, a.shape[1] == b.shape[2],
                a.values.count == a.shape.reduce(1, *), b.values.count == b.shape.reduce(1, *)
            else {
                throw Phi3Error.input(
                    ErrorDetails(
                        place: "slots of \(projection.module)",
                        found: "missing, or of another shape",
                        expected: "(layers, rank, in) and (layers, out, rank) of this model",
                        advice: "Fill the slots from an adapter of this bundle."))
            }
            let rank = a.shape[1]
            let wide = rank * shape.inputs
            let tall = shape.outputs * rank
            for layer in 0..<config.layerCount {
                let rows = Array(a.values[layer * wide..<(layer + 1) * wide])
                let columns = Array(b.values[layer * tall..<(layer + 1) * tall])
                if rows.allSatisfy({ $0 == 0 }) || columns.allSatisfy({ $0 == 0 }) { continue }
                let change = LowRank(
                    a: Tensor(rows, shape: [rank, shape.inputs]).transposed(),
                    b: Tensor(columns, shape: [shape.outputs, rank]).transposed(), m: nil)
                let linear = adapted.blocks[layer][projection].linear
                adapted.blocks[layer][projection].change = SideChange(
                    change, scale: 1, base: linear)
            }
        }
        return adapted
    }

    /// The model with an adapter that is built into its package as functions of their own.
    ///
    /// - Parameters:
    ///   - adapter: its name in the bundle.
    ///   - bundle: the bundle of this model.
    /// - Throws: `Phi3Error`: no such adapter, or the package does not hold it.
    public func applying(builtIn adapter: String, of bundle: ModelBundle) throws -> ReferenceModel {
        try checkBare()
        let entry = bundle.manifest.medphi.adapters.list.first { $0.name == adapter }
        guard let function = entry?.functions["decode"] else {
            throw Phi3Error.adapterIncompatible(
                ProblemList(
                    path: bundle.url.path, what: "has no such adapter built in",
                    problems: ["there is no function for it"],
                    advice: "Choose one of the bundle's adapters."))
        }
        let weights = try PackageWeights(bundle, function: function)
        var adapted = removingLoRA()
        var isChanged = false
        for layer in 0..<config.layerCount {
            for projection in Projection.allCases {
                let site = ProjectionSite(layer: layer, projection: projection)
                guard let change = try weights.factors(adapter, site) else { continue }
                let linear = adapted.blocks[layer][projection].linear
                adapted.blocks[layer][projection].change = SideChange(
                    change, scale: 1, base: linear)
                isChanged = true
            }
        }
        guard isChanged else {
            throw PackageFiles.refused(
                bundle.package, "function '\(function)' holds no adapter")
        }
        return adapted
    }

    private func checkBare() throws {
        if isFused {
            throw Phi3Error.adapterIncompatible(
                ProblemList(
                    path: url.path, what: "cannot take another adapter",
                    problems: ["an adapter is folded into its weights already"],
                    advice: "Apply the adapter to the base."))
        }
    }
}
