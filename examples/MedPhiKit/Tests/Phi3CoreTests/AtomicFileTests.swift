import Foundation
import Synchronization
import Testing

@testable import Phi3Core

@Suite("Files that appear complete or not at all")
struct AtomicFileTests {
    private let home: TestFolder

    init() throws { home = try TestFolder() }

    private func write(_ text: String, replace: Bool = false) throws {
        try AtomicFile.write(to: home["n"], replace: replace) { try $0.write(Data(text.utf8)) }
    }

    private func folder(_ text: String, replace: Bool = false, isOff: Bool = false) throws {
        struct Off: Error {}
        try FolderWriter.write(to: home["n"], replace: replace) {
            try $0.write(Data(text.utf8), name: "a")
            if isOff { throw Off() }
        }
    }

    private func text(_ name: String) -> String? {
        try? String(contentsOf: home[name], encoding: .utf8)
    }

    private var names: [String] {
        ((try? FileManager.default.contentsOfDirectory(atPath: home.url.path)) ?? []).sorted()
    }

    /// Many finish at the same moment; with a look before the rename several of them would succeed.
    @Test(arguments: [false, true])
    func ofManyWritersOfOneNameOneSucceeds(isFolder: Bool) {
        for round in 0..<20 {
            let (ready, gate) = (DispatchSemaphore(value: 0), DispatchSemaphore(value: 0))
            let place = home["n\(round)"]
            let wins = Mutex<[Int]>([])
            let group = DispatchGroup()
            for writer in 0..<8 {
                group.enter()
                Thread.detachNewThread {
                    func meet() {
                        ready.signal()
                        gate.wait()
                    }
                    do {
                        if isFolder {
                            try FolderWriter.write(to: place) {
                                try $0.write(Data([UInt8(writer)]), name: "a")
                                meet()
                            }
                        } else {
                            try AtomicFile.write(to: place, replace: false) {
                                try $0.write(Data([UInt8(writer)]))
                                meet()
                            }
                        }
                        wins.withLock { $0.append(writer) }
                    } catch {
                        if !"\(error)".contains("exists already") {
                            wins.withLock { $0.append(-1) }
                        }
                    }
                    group.leave()
                }
            }
            for _ in 0..<8 { ready.wait() }
            for _ in 0..<8 { gate.signal() }
            group.wait()
            let file = isFolder ? place.appendingPathComponent("a") : place
            let found = (try? Data(contentsOf: file))?.first.map(Int.init)
            #expect(wins.withLock { $0 } == [found ?? -2])
        }
        #expect(names.count == 20)
    }

    @Test func whatAppearsMeanwhileIsNotReplaced() throws {
        #expect(throws: Phi3Error.self) {
            try AtomicFile.write(to: home["n"], replace: false) { _ in try home.write("other", "n")
            }
        }
        #expect(text("n") == "other" && names == ["n"])
        try write("mine", replace: true)
        #expect(text("n") == "mine" && names == ["n"])
    }

    /// Where the disk has neither an exclusive rename nor links.
    @Test(arguments: [false, true])
    func theWayWithoutTheSystemsHelpReplacesNothingEither(isFolder: Bool) throws {
        func put(_ from: String, _ to: String) -> Int32 {
            Placing.new(home[from].path, at: home[to].path, isFolder: isFolder) { _, _, _ in ENOTSUP
            }
        }
        for name in ["one", "two"] { try home.write(name, isFolder ? "\(name)/a" : name) }
        #expect(put("one", "n") == 0 && put("two", "n") == EEXIST)
        #expect(text(isFolder ? "n/a" : "n") == "one" && names == ["n", "two"])
        #expect(put("gone", "m") == ENOENT && names == ["n", "two"])
    }

    @Test func whatKilledWritesLeftIsRemovedAfterADay() throws {
        let stale = [".n.0123ABCD.part", ".n.89abcdef.tmp/x"]
        let others = [
            ".n.0123ABCD.part2", ".n.0123ABC.part", ".n.0123ABCG.part", ".m.0123ABCD.part",
            ".n.x.0123ABCD.part", "n.0123ABCD.part",
        ]
        for name in stale + others { try home.write("x", name) }
        let before = Date(timeIntervalSinceNow: -2 * 86_400)
        for name in names {
            try FileManager.default.setAttributes(
                [.modificationDate: before], ofItemAtPath: home[name].path)
        }
        try home.write("x", ".n.00000000.part")
        try write("mine")
        #expect(names == (others + [".n.00000000.part", "n"]).sorted())
    }

    @Test func aFolderThatWasRenamedAsideComesBack() throws {
        try home.write("old", ".n.0123ABCD.old/a")
        // It is all there is, however old it may be.
        Sibling.tidy(around: home["n"], now: time(nil) + 2 * 86_400)
        #expect(throws: Phi3Error.self) { try folder("new") }
        #expect(text("n/a") == "old" && names == ["n"])
        try FileManager.default.moveItem(at: home["n"], to: home[".n.0123ABCD.old"])
        #expect(throws: (any Error).self) { try folder("new", replace: true, isOff: true) }
        #expect(text("n/a") == "old" && names == ["n"])
        try folder("new", replace: true)
        #expect(text("n/a") == "new" && names == ["n"])
        // With a new one in its place it is of no use, and goes like the others.
        try home.write("old", ".n.0123ABCD.old/a")
        Sibling.tidy(around: home["n"])
        #expect(names == [".n.0123ABCD.old", "n"])
        Sibling.tidy(around: home["n"], now: time(nil) + 2 * 86_400)
        #expect(names == ["n"])
    }

    @Test func aSwapThatFailsHalfwayLeavesTheOldFolder() throws {
        try folder("old")
        #expect(throws: Phi3Error.self) {
            try FolderWriter.write(to: home["n"], replace: true) {
                try FileManager.default.removeItem(at: $0.url)
            }
        }
        #expect(text("n/a") == "old" && names == ["n"])
    }
}
