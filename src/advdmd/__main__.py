from advdmd.cli.main import main

main()
