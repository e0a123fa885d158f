/// Changes of separate q, k, v or gate, up layers, merged into Phi-3's fused projections.
///
/// The merged change stacks the factors A and puts the factors B on a block diagonal, so its product
/// is exactly that of the parts. A part without change gets zeros and, for DoRA, the length of its
/// rows in the base.
enum UnfusedParts {
    /// The same changes by projection; what cannot be merged goes to `problems`.
    static func merged(
        _ modules: [PEFTModule: LowRank], _ base: Checkpoint?, _ problems: AdapterProblems
    ) -> [ProjectionSite: LowRank] {
        var changes: [ProjectionSite: LowRank] = [:]
        var separate: Set<ProjectionSite> = []
        for (module, change) in modules {
            if let projection = Projection(key: module.key) {
                changes[ProjectionSite(layer: module.layer, projection: projection)] = change
            } else if let fused = PEFTModule.parts.first(where: { $0.value.contains(module.key) }) {
                separate.insert(ProjectionSite(layer: module.layer, projection: fused.key))
            }
        }
        for site in separate.sorted() {
            if changes[site] != nil {
                problems.add("\(site.name): changed both as a whole and in its parts")
                continue
            }
            let names = PEFTModule.parts[site.projection] ?? []
            let parts = names.map { modules[PEFTModule(layer: site.layer, key: $0)] }
            guard let merged = merged(site, parts, base, problems) else {
                let lacking = zip(names, parts).filter { $0.1 == nil }.map(\.0)
                problems.add(
                    "\(site.name): no change of \(lacking.joined(separator: " and ")) that fits, "
                        + "so only the base tells")
                continue
            }
            changes[site] = merged
        }
        return changes
    }

    private static func merged(
        _ site: ProjectionSite, _ parts: [LowRank?], _ base: Checkpoint?,
        _ problems: AdapterProblems
    ) -> LowRank? {
        guard let sizes = sizes(parts, base), let first = parts.compactMap({ $0 }).first else {
            return nil
        }
        let inputs = first.a.shape[0]
        let rank = parts.reduce(0) { $0 + ($1?.rank ?? 0) }
        let outputs = sizes.reduce(0, +)
        guard rank <= Adapter.largestRank,
            parts.allSatisfy({ $0 == nil || $0?.a.shape[0] == inputs })
        else { return nil }
        let magnitudes = magnitudes(site, parts, sizes, base)
        guard let magnitudes else { return nil }
        var a = [Float](repeating: 0, count: inputs * rank)
        var b = [Float](repeating: 0, count: rank * outputs)
        var begin = 0
        var column = 0
        for (part, size) in zip(parts, sizes) {
            if let part {
                guard part.b.shape[1] == size else { return nil }
                place(part.a.floats(), part.rank, into: &a, width: rank, row: 0, column: column)
                place(part.b.floats(), size, into: &b, width: outputs, row: column, column: begin)
                column += part.rank
            }
            begin += size
        }
        let type = first.a.type
        let same = parts.allSatisfy { $0 == nil || ($0?.a.type == type && $0?.b.type == type) }
        let kept = same ? type : .f32
        return LowRank(
            a: Tensor(a, shape: [inputs, rank], as: kept),
            b: Tensor(b, shape: [rank, outputs], as: kept),
            m: magnitudes.isEmpty ? nil : Tensor(magnitudes, shape: [outputs]))
    }

    /// Copies a matrix of some width into a wider one.
    private static func place(
        _ values: [Float], _ width: Int, into target: inout [Float], width wide: Int, row: Int,
        column: Int
    ) {
        guard width > 0 else { return }
        for (index, value) in values.enumerated() {
            target[(row + index / width) * wide + column + index % width] = value
        }
    }

    /// Output rows of each part: from its own B, or from the base where there is none.
    private static func sizes(_ parts: [LowRank?], _ base: Checkpoint?) -> [Int]? {
        let own = parts.map { $0?.b.shape[1] }
        var other: [Int?]
        if let config = base?.config {
            other =
                own.count == 3
                ? [config.queryWidth, config.keyValueWidth, config.keyValueWidth]
                : [config.intermediateSize, config.intermediateSize]
        } else if own.count == 2 {  // gate and up are equally wide
            other = [own[1], own[0]]
        } else {  // and so are keys and values
            other = [nil, own[2], own[1]]
        }
        let sizes = zip(own, other).compactMap { $0 ?? $1 }
        return sizes.count == own.count ? sizes : nil
    }

    /// DoRA's magnitudes; empty without DoRA, `nil` where only the base could tell.
    private static func magnitudes(
        _ site: ProjectionSite, _ parts: [LowRank?], _ sizes: [Int], _ base: Checkpoint?
    ) -> [Float]? {
        if parts.allSatisfy({ $0?.m == nil }) { return [] }
        var magnitudes: [Float] = []
        var begin = 0
        for (part, size) in zip(parts, sizes) {
            if let m = part?.m {
                magnitudes += m.floats()
            } else {
                guard let base, let weight = WeightMatrix(base, layer: site.name),
                    begin + size <= weight.rows
                else { return nil }
                for row in begin..<begin + size {
                    let sum = weight.row(row).reduce(0) { $0 + $1 * $1 }
                    magnitudes.append(sum.squareRoot())
                }
            }
            begin += size
        }
        return magnitudes
    }
}
