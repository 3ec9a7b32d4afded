"""`python -m voipavatar` is `voipavatar`."""

from voipavatar.cli import main

if __name__ == "__main__":
    main()
