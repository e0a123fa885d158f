import MedPhiKitCommand

await MedPhiKitCommand.main()
