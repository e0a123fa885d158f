import Phi3Core
import Testing

@testable import Phi3CoreML

@Suite struct BlockPlanTests {
    private func shown(_ blocks: [BlockPlan]) -> [String] {
        blocks.map { "\($0.isWide ? "prefill" : "decode") \($0.range)" }
    }

    @Test func aPromptIsReadInBlocks() {
        #expect(shown(BlockPlan.blocks(of: 0..<1, context: 256, width: 64)) == ["decode 0..<1"])
        #expect(shown(BlockPlan.blocks(of: 0..<2, context: 256, width: 64)) == ["prefill 0..<2"])
        #expect(
            shown(BlockPlan.blocks(of: 0..<130, context: 256, width: 64)) == [
                "prefill 0..<64", "prefill 64..<128", "prefill 128..<130",
            ])
        #expect(
            shown(BlockPlan.blocks(of: 0..<65, context: 256, width: 64)) == [
                "prefill 0..<64", "decode 64..<65",
            ])
        #expect(BlockPlan.blocks(of: 5..<5, context: 256, width: 64).isEmpty)
    }

    @Test func aBlockNeverLeavesTheCache() {
        for context in [64, 70, 128] {
            for begin in 0..<context {
                let blocks = BlockPlan.blocks(of: begin..<context, context: context, width: 64)
                #expect(blocks.flatMap { Array($0.range) } == Array(begin..<context))
                for block in blocks {
                    #expect(block.position + (block.isWide ? 64 : 1) <= context)
                    #expect(block.isWide || block.range.count == 1)
                }
            }
        }
    }

    @Test func atLeastTheLastIdIsReadAgain() {
        #expect(BlockPlan.reusable([], for: [1]) == 0)
        #expect(BlockPlan.reusable([1, 2, 3], for: [1, 2, 3]) == 2)
        #expect(BlockPlan.reusable([1, 2, 3], for: [1, 2]) == 1)
        #expect(BlockPlan.reusable([1, 2, 3], for: [1, 9, 3, 4]) == 1)
        #expect(BlockPlan.reusable([1, 2], for: [1, 2, 3, 4]) == 2)
    }

    @Test func theSecondSetOfTablesLiesBehindTheFirst() {
        #expect(BlockPlan.ropeRow(position: 7, context: 64, usesLongFactors: false) == 7)
        #expect(BlockPlan.ropeRow(position: 7, context: 64, usesLongFactors: true) == 71)
    }

    @Test func aQuerySeesItselfAndWhatCameBefore() {
        #expect(MaskPlan.visible(query: 0, window: nil) == 0..<1)
        #expect(MaskPlan.visible(query: 9, window: nil) == 0..<10)
        #expect(MaskPlan.visible(query: 9, window: 4) == 6..<10)
        #expect(MaskPlan.visible(query: 2, window: 4) == 0..<3)
    }

    @Test func changesOfAMaskMakeTheNewRow() {
        for (oldBegin, oldEnd, newBegin, newEnd) in [
            (0, 0, 0, 5), (0, 5, 0, 6), (0, 6, 0, 2), (3, 7, 4, 8), (0, 3, 5, 9), (5, 9, 0, 3),
            (2, 4, 0, 9), (0, 9, 2, 4), (1, 4, 1, 4),
        ] {
            let old = oldBegin..<oldEnd
            let new = newBegin..<newEnd
            var row = (0..<10).map { old.contains($0) }
            let changes = MaskPlan.changes(from: old, to: new)
            for column in changes.shown.joined() {
                #expect(!row[column])
                row[column] = true
            }
            for column in changes.hidden.joined() {
                #expect(row[column])
                row[column] = false
            }
            #expect(row == (0..<10).map { new.contains($0) })
        }
        // One step further: one number.
        let step = MaskPlan.changes(from: 0..<100, to: 0..<101)
        #expect(step.shown == [100..<101] && step.hidden.isEmpty)
    }
}
