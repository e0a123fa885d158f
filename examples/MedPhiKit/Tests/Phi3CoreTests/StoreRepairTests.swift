import Foundation
import Testing

@testable import Phi3Core

@Suite("Repairing an installed bundle", StoreFixtures.limit)
struct StoreRepairTests {
    enum Damage: CaseIterable {
        case cut, missing, folder, link, altered, unlisted, manifest, sums
    }

    private let server: StoreServer
    private let home: TestFolder
    private let store: BundleStore
    private let old: InstalledBundle
    private let new: InstalledBundle

    /// Two versions, the second of them in use.
    init() async throws {
        server = try StoreServer()
        home = try TestFolder()
        store = try StoreFixtures.store(home)
        try server.serve(StoreFixtures.bundle(seed: 1), as: "b")
        old = try await store.install("notes", from: server.url("b"))
        try server.serve(StoreFixtures.bundle(seed: 2), as: "b")
        new = try await store.install("notes", from: server.url("b"))
        _ = server.takeRequests()
    }

    private var weights: URL { new.url.appendingPathComponent(StoreFixtures.weights) }

    private func spoil(_ damage: Damage) throws {
        let files = FileManager.default
        switch damage {
        case .cut: try Data(contentsOf: weights).dropLast().write(to: weights)
        case .altered: try StoreFixtures.bytes(100_000, seed: 9).write(to: weights)
        case .unlisted: try home.write("x", "notes.medphi/tokenizer/more.json")
        case .manifest, .sums:
            // It is the same file as in what else was made of these bytes; only this name changes.
            let name = damage == .sums ? "SHA256SUMS" : "metadata.json"
            let place = new.url.appendingPathComponent(name)
            let data = try Data(contentsOf: place)
            try files.removeItem(at: place)
            if damage == .manifest { try (data + Data(" ".utf8)).write(to: place) }
        case .missing, .folder, .link:
            let aside = home["aside"]
            try files.moveItem(at: weights, to: aside)
            if damage == .folder {
                try files.createDirectory(at: weights, withIntermediateDirectories: false)
            }
            if damage == .link {
                try files.createSymbolicLink(at: weights, withDestinationURL: aside)
            }
        }
    }

    @Test func whatNobodyInstalledIsLeftAlone() async throws {
        try home.write("work", "other.medphi/thesis.txt")
        await #expect(throws: Phi3Error.self) {
            try await store.install("other", from: server.url("b"))
        }
        try home.write("work", "third.medphi")
        await #expect(throws: Phi3Error.self) {
            try await store.install("third", from: server.url("b"))
        }
        #expect(FileBytes.kind(of: home["other.medphi/thesis.txt"]) == .file)
        #expect(FileBytes.kind(of: home["third.medphi"]) == .file)
    }

    @Test(arguments: Damage.allCases)
    func whatIsDamagedIsFetchedAndTheVersionBeforeStays(_ damage: Damage) async throws {
        try spoil(damage)
        let here = try await store.install(
            "notes", from: server.url("b"), version: new.version, verifying: damage == .altered)
        #expect(here == new)
        _ = try ModelBundle.open(here.url)
        let isElsewhere = [.unlisted, .manifest, .sums].contains(damage)
        let more = isElsewhere ? [] : ["/b/\(StoreFixtures.weights)"]
        #expect(
            server.takeRequests().map(\.path) == ["/b/SHA256SUMS", "/b/metadata.json"] + more)
        #expect(try await store.rollback("notes").version == old.version)
    }

    @Test func withoutAVersionDamageIsFoundToo() async throws {
        try spoil(.cut)
        #expect(try await store.install("notes", from: server.url("b")) == new)
        _ = try ModelBundle.open(new.url)
        #expect(server.takeRequests().count == 3)
    }

    @Test func bytesAreReadOnlyWhereThatIsAskedFor() async throws {
        try spoil(.altered)
        #expect(try await store.install("notes", from: server.url("b")) == new)
        #expect(server.takeRequests().map(\.path) == ["/b/SHA256SUMS"])
        #expect(throws: Phi3Error.self) { try ModelBundle.open(new.url) }
        #expect(try await store.install("notes", from: server.url("b"), verifying: true) == new)
        _ = try ModelBundle.open(new.url)
    }

    @Test func aDamagedVersionIsNotKeptBehindANewOne() async throws {
        try spoil(.cut)
        try server.serve(StoreFixtures.bundle(seed: 3), as: "b")
        let newest = try await store.install("notes", from: server.url("b"))
        #expect(newest.version != new.version)
        #expect(try await store.rollback("notes").version == old.version)
    }

    #if canImport(Darwin)
        @Test func aSessionFindsEveryMethodOfItsDelegate() {
            for name in [
                "task:willPerformHTTPRedirection:newRequest:completionHandler:",
                "dataTask:didReceiveResponse:completionHandler:", "dataTask:didReceiveData:",
                "task:didCompleteWithError:",
            ] {
                #expect(Router().responds(to: NSSelectorFromString("URLSession:\(name)")))
            }
        }
    #endif
}
