import Foundation
import Phi3Core
import Testing

@testable import Phi3Reference

/// Logits are compared with those of transformers in float32; sums in another order differ by some
/// 1e-6, and a wrong mask, factor or order of heads by more than 1e-2.
private let tolerance: Float = 1e-4

@Suite struct ReferenceModelTests {
    @Test(arguments: Fixtures.names)
    func logitsEqualThoseOfTransformers(name: String) throws {
        let folder = Fixtures.phi3.appendingPathComponent(name)
        let model = try ReferenceModel.load(folder)
        let expected = try Expected(folder)
        for (ids, logits) in zip(expected.rows, expected.logits) {
            #expect(largestDifference(try model.logits(ids), logits) < tolerance)
        }
    }

    @Test(arguments: Fixtures.names)
    func greedyContinuationsAreIdentical(name: String) throws {
        let folder = Fixtures.phi3.appendingPathComponent(name)
        let model = try ReferenceModel.load(folder)
        let expected = try Expected(folder)
        #expect(try greedily(model, Array(expected.rows[0].prefix(16)), 24) == expected.greedy)
    }

    @Test(arguments: Fixtures.names)
    func readingTokenByTokenGivesTheSameBits(name: String) throws {
        let folder = Fixtures.phi3.appendingPathComponent(name)
        let model = try ReferenceModel.load(folder)
        let ids = try Expected(folder).rows[1]
        let whole = try model.logits(ids)
        let size = model.config.vocabSize
        var cache = KVCache(model.config, length: ids.count)
        for (row, id) in ids.enumerated() {
            let one = try model.read([id], cache: &cache, output: .row(0))
            #expect(one == Array(whole[row * size..<(row + 1) * size]))
        }
    }

    @Test func packedWeightsGiveTheBitsOfExpandedOnes() throws {
        for name in ["gqa", "partial-rotary-tied"] {
            let folder = Fixtures.phi3.appendingPathComponent(name)
            let ids = try Expected(folder).rows[0]
            let packed = try ReferenceModel.load(folder, options: .init(expandedBytes: 0))
            #expect(try packed.logits(ids) == ReferenceModel.load(folder).logits(ids))
        }
    }

    @Test func aSequenceThatOutgrowsTheShortFactorsIsReadAgain() throws {
        let folder = Fixtures.phi3.appendingPathComponent("longrope-long")
        let model = try ReferenceModel.load(folder)
        let ids = try Expected(folder).rows[0]
        var session = ReferenceSession(model)
        for length in [31, 32, 33, 34, 20] {
            let sequence = Array(ids.prefix(length))
            let whole = try model.logits(sequence).suffix(model.config.vocabSize)
            #expect(try session.logits(after: sequence) == Array(whole))
        }
        var cache = KVCache(model.config, length: 32)
        _ = try model.read(Array(ids.prefix(32)), cache: &cache, output: .none)
        #expect(throws: Phi3Error.self) { try model.read([1], cache: &cache, output: .none) }
    }

    @Test func aSessionReadsOnlyWhatIsNewAndGivesTheSameBits() throws {
        let folder = Fixtures.phi3.appendingPathComponent("mini-4k")
        let model = try ReferenceModel.load(folder)
        let rows = try Expected(folder).rows
        var session = ReferenceSession(model)
        for sequence in [
            rows[0], Array(rows[0].prefix(20)) + rows[1], rows[0], Array(rows[0].prefix(5)),
        ] {
            let fresh = try model.logits(sequence).suffix(model.config.vocabSize)
            #expect(try session.logits(after: sequence) == Array(fresh))
            #expect(session.ids == sequence)
        }
    }

    @Test func paddedBlocksWithAMaskGiveTheSameLogits() throws {
        let folder = Fixtures.phi3.appendingPathComponent("sliding-window")
        let model = try ReferenceModel.load(folder)
        let ids = Array(try Expected(folder).rows[0].prefix(37))
        let window = try #require(model.config.slidingWindow)
        let context = 64
        let width = 16
        var cache = KVCache(model.config, capacity: context, usesLongFactors: false)
        var last: [Float] = []
        for begin in stride(from: 0, to: ids.count, by: width) {
            let block = Array(ids[begin..<min(begin + width, ids.count)])
            var mask = [Float](repeating: -10000, count: width * context)
            for row in block.indices {
                let position = begin + row
                for key in max(0, position - window + 1)...position {
                    mask[row * context + key] = 0
                }
            }
            let padded = block + [Int32](repeating: 0, count: width - block.count)
            last = try model.step(
                padded, at: begin, cache: &cache, mask: .additive(mask, columns: context),
                usesLongFactors: false, output: .row(block.count - 1))
        }
        let whole = try model.logits(ids).suffix(model.config.vocabSize)
        #expect(largestDifference(last, Array(whole)) < 1e-6)
    }

    @Test func impossibleTokensAreRefused() throws {
        let model = try ReferenceModel.load(Fixtures.phi3.appendingPathComponent("gqa"))
        let size = Int32(model.config.vocabSize)
        for ids in [[], [-1], [size], [Int32.max], [Int32.min]] as [[Int32]] {
            #expect(throws: Phi3Error.self) { try model.logits(ids) }
        }
        let long = [Int32](repeating: 1, count: model.config.maxPositions + 1)
        #expect(throws: Phi3Error.self) { try model.logits(long) }
    }
}

@Suite struct ReferenceAdapterTests {
    private let folder = Fixtures.phi3.appendingPathComponent("mini-4k")
    private let unstated = AdapterOptions(allowsUnstatedBase: true)

    private func adapted(_ name: String) throws -> ReferenceModel {
        try ReferenceModel.load(folder).applyLoRA(
            folder.appendingPathComponent(name), options: unstated)
    }

    @Test(arguments: Fixtures.adapters)
    func logitsUnderAnAdapterEqualThoseOfTransformers(name: String) throws {
        let expected = try Expected(folder.appendingPathComponent(name), ids: folder)
        let model = try adapted(name)
        for (ids, logits) in zip(expected.rows, expected.logits) {
            #expect(largestDifference(try model.logits(ids), logits) < tolerance)
            #expect(largestDifference(try model.fused().logits(ids), logits) < tolerance)
        }
    }

    @Test func swappingAdaptersGivesTheBaseBackBitForBit() throws {
        let ids = try Expected(folder).rows[0]
        let base = try ReferenceModel.load(folder)
        let before = try base.logits(ids)
        let a = try base.applyLoRA(folder.appendingPathComponent("peft_0"), options: unstated)
        let underA = try a.logits(ids)
        let b = try a.applyLoRA(folder.appendingPathComponent("peft_1"), options: unstated)
        #expect(try b.logits(ids) != underA)
        #expect(underA != before)
        #expect(try b.removingLoRA().logits(ids) == before)
        let again = try b.applyLoRA(folder.appendingPathComponent("peft_0"), options: unstated)
        #expect(try again.logits(ids) == underA)
        #expect(try base.logits(ids) == before)
    }

    @Test func slotsGiveTheAdaptersLogitsAndEmptySlotsTheBases() throws {
        let base = try ReferenceModel.load(folder)
        let ids = try Expected(folder).rows[0]
        var target = base.target
        target.slotRank = 16
        func filled(_ adapter: Adapter?) throws -> ReferenceModel {
            let slots = try AdapterSlots(adapter, for: target).slots.map { slot in
                (slot.name, (shape: slot.shape, values: slot.bits.map { HalfFloat.value(of: $0) }))
            }
            return try base.applying(slots: Dictionary(slots) { first, _ in first })
        }
        #expect(try filled(nil).logits(ids) == base.logits(ids))
        let adapter = try Adapter.read(folder.appendingPathComponent("peft_0"))
        let wanted = try adapted("peft_0").logits(ids)
        // The factors are rounded to half precision, by 0.05 % at most.
        #expect(largestDifference(try filled(adapter).logits(ids), wanted) < 2e-3)
        let dora = try Adapter.read(folder.appendingPathComponent("peft_2"))
        #expect(throws: Phi3Error.self) { try filled(dora) }
    }

    @Test func anAdapterThatDoesNotNameItsBaseNeedsPermission() throws {
        let base = try ReferenceModel.load(folder)
        #expect(throws: Phi3Error.self) {
            try base.applyLoRA(folder.appendingPathComponent("peft_0"))
        }
    }

    @Test func aFusedModelTakesNoOtherAdapter() throws {
        let fused = try adapted("peft_0").fused()
        #expect(throws: Phi3Error.self) {
            try fused.applyLoRA(folder.appendingPathComponent("peft_1"), options: unstated)
        }
        #expect(fused.removingLoRA().isFused)
    }

    @Test(arguments: Fixtures.adapters, [true, false])
    func aSavedModelGivesTheAdaptersLogits(name: String, singleFile: Bool) throws {
        let room = try Fixtures.temporary()
        let ids = try Expected(folder).rows[0]
        let model = try adapted(name)
        let place = room[singleFile ? "model.safetensors" : "fused"]
        try model.save(place)
        let loaded = try ReferenceModel.load(place)
        #expect(largestDifference(try loaded.logits(ids), try model.logits(ids)) < 1e-5)
        #expect(loaded.fingerprint != model.fingerprint)
        #expect(throws: Phi3Error.self) { try model.save(place) }
        try model.save(place, replace: true)
    }

    @Test(arguments: Fixtures.adapters, ["changes.safetensors", "changes"])
    func aSavedAdapterGivesTheSameBits(name: String, file: String) throws {
        let room = try Fixtures.temporary()
        let ids = try Expected(folder).rows[0]
        let model = try adapted(name)
        try model.saveLoRA(room[file])
        let again = try ReferenceModel.load(folder).applyLoRA(room[file])
        #expect(try again.logits(ids) == model.logits(ids))
        #expect(again.adapter?.origin.baseFingerprint == model.fingerprint)
        #expect(throws: Phi3Error.self) { try model.saveLoRA(room[file]) }
        try model.saveLoRA(room[file], as: .f16, replace: true)
        #expect(throws: Phi3Error.self) {
            try ReferenceModel.load(folder).saveLoRA(room["none.safetensors"])
        }
        let other = try ReferenceModel.load(Fixtures.phi3.appendingPathComponent("sliding-window"))
        #expect(throws: Phi3Error.self) { try other.applyLoRA(room[file]) }
    }
}

@Suite struct ReferenceDemoTests {
    /// Logits that `mlx_medphi` gives in float32 for ids (37 i + 11) mod 1100, i < 40, at the last row.
    private static let expected: [(id: Int, logit: Float)] = [
        (0, -5.052775859832764), (1, -3.265916347503662), (5, -4.806535243988037),
        (100, -4.108684062957764), (500, 1.7745777368545532), (1000, -6.5219621658325195),
        (1140, -4.312806606292725), (1151, 0.7804759740829468),
    ]

    @Test func logitsOfTheDemosBaseEqualPythons() throws {
        let model = try ReferenceModel.load(Fixtures.tiny)
        var session = ReferenceSession(model)
        let logits = try session.logits(after: (0..<40).map { Int32(($0 * 37 + 11) % 1100) })
        for (id, logit) in Self.expected { #expect(abs(logits[id] - logit) < tolerance) }
        #expect(logits.indices.max { logits[$0] < logits[$1] } == 284)
    }

    @Test func plainAndVectorSumsAreTheSameBits() {
        var seed: UInt32 = 1
        let numbers = (0..<200).map { _ in
            seed = seed &* 1_664_525 &+ 1_013_904_223
            return Float(seed) / 1e9 - 2
        }
        numbers.withUnsafeBufferPointer { room in
            guard let a = room.baseAddress else { return }
            for count in [0, 1, 7, 8, 9, 16, 63, 99] {
                #expect(Kernels.plainDot(a, a + 100, count) == Kernels.vectorDot(a, a + 100, count))
            }
        }
    }
}
