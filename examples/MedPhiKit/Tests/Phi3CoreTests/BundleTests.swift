import Foundation
import Testing

@testable import Phi3Core

@Suite struct BundleTests {
    /// A bundle whose files hold a few bytes each, with a manifest and hashes that fit.
    private static func bundle() throws -> TestFolder {
        let folder = try TestFolder()
        let hash = SHA256.hex(Data("abc".utf8))
        let text = ManifestFixture.value().text(.pretty).replacing(ManifestFixture.hash, with: hash)
        let paths = try Manifest.parse(JSONValue(parsing: text)).medphi.files.map(\.path)
        for path in paths { try folder.write("abc", path) }
        try folder.write(text, "metadata.json")
        try writeSums(folder, paths)
        return folder
    }

    private static func writeSums(_ folder: TestFolder, _ paths: [String]) throws {
        let lines = try (paths + ["metadata.json"]).sorted().map {
            "\(try SHA256.hex(contentsOf: folder[$0]))  \($0)\n"
        }
        try folder.write(lines.joined(), "SHA256SUMS")
    }

    private func problems(_ folder: TestFolder) -> [String] {
        listedProblems { _ = try ModelBundle.open(folder.url) }
    }

    @Test func aWholeBundleOpens() throws {
        let folder = try Self.bundle()
        try folder.write("", ".DS_Store")
        var seen: [Int] = []
        let bundle = try ModelBundle.open(folder.url) { done, _ in seen.append(done) }
        #expect(bundle.manifest.name == "notes")
        #expect(bundle.adapters["soap"]?.lastPathComponent == "soap.safetensors")
        #expect(bundle.tokenizerFolder.lastPathComponent == "tokenizer")
        #expect(seen.sorted() == seen && seen.count == 6)
        #expect(try ModelBundle.open(folder.url, check: false).byteCount == 15)
    }

    @Test func everyAlteredMissingAndUnlistedFileIsNamed() throws {
        let folder = try Self.bundle()
        try folder.write("abd", "tokenizer/tokenizer.json")
        try FileManager.default.removeItem(at: folder["tokenizer/vectors.json"])
        try folder.write("x", "model/Phi3.mlpackage/Data/extra")
        #expect(
            problems(folder) == [
                "model/Phi3.mlpackage/Data/extra is not listed",
                "tokenizer/tokenizer.json is altered",
                "tokenizer/vectors.json is missing",
            ])
    }

    @Test func anAlteredManifestIsNamed() throws {
        let folder = try Self.bundle()
        try folder.write("{}", "metadata.json")
        #expect(problems(folder) == ["metadata.json is altered"])
    }

    @Test func linksAndDevicesAreRefused() throws {
        let folder = try Self.bundle()
        let outside = try TestFolder()
        try outside.write("abc", "x")
        let place = folder["tokenizer/vectors.json"]
        try FileManager.default.removeItem(at: place)
        try FileManager.default.createSymbolicLink(at: place, withDestinationURL: outside["x"])
        #expect(names(problems(folder), "tokenizer/vectors.json is a link"))
        try FileManager.default.removeItem(at: place)
        #expect(mkfifo(place.path, 0o600) == 0)
        #expect(names(problems(folder), "tokenizer/vectors.json is a link"))
    }

    @Test func aManifestThatDisagreesWithTheHashesIsNamed() throws {
        let folder = try Self.bundle()
        try folder.write("abc", "extra")
        let paths = try ModelBundle.open(folder.url, check: false).manifest.medphi.files.map(\.path)
        try Self.writeSums(folder, paths + ["extra"])
        #expect(problems(folder) == ["extra: not in the manifest"])
    }

    @Test(arguments: [
        "", "abc", "\u{0}", "aa  x\n", "\(String(repeating: "a", count: 64)) x\n",
        "\(String(repeating: "a", count: 64))  ../x\n", "\(String(repeating: "A", count: 64))  x\n",
        "\(String(repeating: "a", count: 64))  x", "\(String(repeating: "a", count: 64))  x\r\n",
        String(repeating: "\(String(repeating: "a", count: 64))  x\n", count: 2),
    ])
    func aDamagedListOfHashesIsRefused(text: String) throws {
        let folder = try Self.bundle()
        try folder.write(text, "SHA256SUMS")
        #expect(throws: Phi3Error.self) { try ModelBundle.open(folder.url) }
    }

    @Test func whatIsNoBundleIsRefused() throws {
        let folder = try TestFolder()
        #expect(throws: Phi3Error.self) { try ModelBundle.open(folder.url) }
        #expect(throws: Phi3Error.self) { try ModelBundle.open(folder["none"]) }
        #expect(throws: Phi3Error.self) { try ModelBundle.open(folder.write("", "file")) }
        let bundle = try Self.bundle()
        try FileManager.default.removeItem(at: bundle["SHA256SUMS"])
        #expect(throws: Phi3Error.self) { try ModelBundle.open(bundle.url) }
        try bundle.write(Data([0xFF, 0xFE]), "SHA256SUMS")
        #expect(throws: Phi3Error.self) { try ModelBundle.open(bundle.url) }
    }

    @Test func theCheckCanBeStopped() throws {
        struct Stop: Error {}
        let folder = try Self.bundle()
        #expect(throws: Stop.self) { try ModelBundle.open(folder.url) { _, _ in throw Stop() } }
    }
}
