import Foundation
import Testing

@testable import Phi3Core

/// Places that are one place under two names, and writing that is stopped.
@Suite struct BundlePlaceTests {
    private func overlap(_ one: URL, _ other: URL) -> Bool {
        // A disk that does not tell large letters from small ones.
        FileBytes.overlap(one, other) { path in
            FileBytes.identity(of: path.lowercased()).map {
                FileBytes.Identity(device: $0.device &+ 1, number: $0.number)
            }
        }
    }

    @Test func anotherSpellingIsTheSamePlaceWhereTheDiskSaysSo() throws {
        let folder = URL(fileURLWithPath: "/tmp/medphi-\(UUID().uuidString.lowercased())")
        defer { try? FileManager.default.removeItem(at: folder) }
        let bundle = folder.appendingPathComponent("notes.medphi")
        try FileManager.default.createDirectory(at: bundle, withIntermediateDirectories: true)
        let other = folder.appendingPathComponent("Notes.medphi")
        #expect(overlap(other, bundle) && overlap(bundle, other))
        #expect(overlap(other.appendingPathComponent("a/b.medphi"), bundle))
        #expect(overlap(bundle, other.appendingPathComponent("a/b.medphi")))
        #expect(!overlap(folder.appendingPathComponent("Notes2.medphi"), bundle))
        // This disk knows them apart where it is one that does.
        #expect(FileBytes.overlap(other, bundle) == (FileBytes.kind(of: other) == .folder))
    }

    @Test func twoNamesOfOneFileAreOnePlace() throws {
        let folder = try TestFolder()
        try folder.write("abc", "one.safetensors")
        try FileManager.default.linkItem(
            at: folder["one.safetensors"], to: folder["two.safetensors"])
        #expect(FileBytes.overlap(folder["one.safetensors"], folder["two.safetensors"]))
        #expect(!FileBytes.overlap(folder["one.safetensors"], folder["three.safetensors"]))
        #expect(FileBytes.overlap(folder["one.safetensors"], folder.url))
    }

    @Test func aCancelledTaskStopsWritingAndLeavesNothing() async throws {
        let folder = try TestFolder()
        let place = folder["x.safetensors"]
        let task = Task {
            let count = 3 << 20
            let piece = TensorPiece(name: "a", type: .f32, shape: [count]) { write in
                // The first half is on the disk by now.
                try write(Data(count: count * 2))
                withUnsafeCurrentTask { $0?.cancel() }
                try write(Data(count: count * 2))
                Issue.record("it went on")
            }
            try SafetensorsWriter.write(to: place, pieces: [piece], metadata: [])
        }
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(try FileManager.default.contentsOfDirectory(atPath: folder.url.path) == [])
    }
}
