#!/bin/bash
# The hook before the gateway ends. Clients are told to go elsewhere (GOAWAY), streams that are under way go on, and the
# hook returns when the last one has ended. Kubernetes ends it after the pod's grace period. The image has no curl.
admin_port=${ADMIN_PORT:-9901}
settle_s=${SETTLE_S:-15}  # until no new connection comes: the pod leaves the Service
drain_s=${DRAIN_S:-30}    # --drain-time-s: until every connection was told
look_s=${LOOK_S:-1}

ask() {  # METHOD PATH: the answer of Envoy's admin interface
  exec 3<>"/dev/tcp/127.0.0.1/$admin_port" || return 1
  printf '%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' "$1" "$2" >&3
  timeout 10 cat <&3
  exec 3>&-
}

sleep "$settle_s"
until ask POST '/drain_listeners?graceful&skip_exit' 2>/dev/null | grep -q '^HTTP/1.1 200'; do sleep "$look_s"; done
sleep "$drain_s"
empty=0
while ((empty < 3)); do  # a look between two streams of one client is no end
  if ask GET '/stats?filter=http.grpc.downstream_rq_active' 2>/dev/null \
      | grep -Eq '^http\.grpc\.downstream_rq_active: 0[[:space:]]*$'; then
    empty=$((empty + 1))
  else
    empty=0
  fi
  sleep "$look_s"
done
