from advdmd.cli import main

main()
