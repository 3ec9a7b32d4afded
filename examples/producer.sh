#!/bin/sh
# Let the avatar that is on air say a text, with nothing but curl: sh producer.sh "Hello."
set -eu
base=${VOIPAVATAR_URL:-http://127.0.0.1:8080}
auth="authorization: Bearer ${VOIPAVATAR_TOKEN:-}"
session=${VOIPAVATAR_SESSION:-$(curl -fsS -H "$auth" "$base/sessions" |
    sed -n 's/^\[{"id":"\([^"]*\)".*/\1/p')}
[ -n "$session" ] || { echo "no session is open: name one in VOIPAVATAR_SESSION" >&2; exit 1; }
# A JSON string: backslashes and quotes escaped, control characters dropped.
text=$(printf %s "$1" | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')
curl -fsS -H "$auth" -H 'content-type: application/json' \
    -d "{\"text\": \"$text\"}" "$base/sessions/$session/say?wait=finished"
echo
