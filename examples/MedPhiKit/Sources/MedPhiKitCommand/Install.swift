import Foundation
import MedPhiKit

/// `install`: fetch a bundle, check it, and put it in its place.
enum Install {
    static let verb = Verb(
        name: "install",
        summary: "Fetch a bundle from a server, whole and checked, or go on with it.",
        places: [
            Verb.Place(name: "URL", help: "The bundle's folder: https, or http on this machine."),
            Verb.Place(name: "FOLDER", help: "Where bundles are kept."),
        ],
        options: [
            Verb.Option("name", "NAME", "What to install it as [default: the last part of URL]."),
            Verb.Option(
                "version", "SHA256", "The SHA-256 of the SHA256SUMS that must come [default: any]."),
            Verb.Option("rollback", nil, "Fetch nothing: put the version before back in use."),
            Verb.json,
        ],
        examples: [
            "medphi-kit install https://example.com/models/notes.medphi bundles",
            "medphi-kit install https://example.com/models/notes.medphi bundles --rollback",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        let text = arguments.place("URL") ?? ""
        guard let address = URL(string: text), address.scheme != nil else {
            throw UsageFailure("URL is '\(Console.shown(text))', expected https://HOST/NAME.medphi")
        }
        let name = arguments.text("name") ?? address.lastPathComponent
        // Naming an address is asking for the network.
        let store = try BundleStore(
            folder: arguments.url("FOLDER"), options: StoreOptions(allowsNetwork: true))
        let last = LastLine()
        let installed =
            arguments.has("rollback")
            ? try await store.rollback(name)
            : try await store.install(
                name, from: address, version: arguments.text("version"), verifying: true
            ) { event in
                let line = line(event)
                if last.isNew(line) { console.note(line) }
            }
        if arguments.has("json") {
            console.print(
                [
                    "name": .string(installed.name), "path": .string(installed.url.path),
                    "version": .string(installed.version),
                    "has_previous": .bool(installed.hasPrevious),
                ] as JSONValue)
        } else {
            console.print(installed.url.path)
        }
        return 0
    }

    private static func line(_ event: InstallEvent) -> String {
        switch event {
        case .listed(let files, let bytes): "\(files) files to fetch, \(Console.size(bytes))"
        case .receiving(_, let done, let total):
            "fetched \(percent(done, of: total)) %"
        case .waiting(let path, let seconds, let reason):
            "\(path): \(reason); again in \(String(format: "%.1f", seconds)) s"
        case .installing: "moving it to its place"
        }
    }

    /// How much is here, in whole tenths.
    static func percent(_ done: Int, of total: Int) -> Int {
        guard total > 0, done < total else { return 100 }
        // A product of large counts could overflow.
        return Int(Double(max(0, done)) / Double(total) * 10) * 10
    }
}
